"""Attention of one or a few queries to a long cache on TPU: the cache is read once, and no further than it is filled.

The cache stays as it is in memory, [B,S,K,D]: a block of slots is one copy, and its slots times heads are the columns
of one matrix product with all query heads. Of these products only those of a query with its own key head count, but the
matrix unit takes as long for few rows as for many, and cutting the heads apart would cost more than the rest.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import compat
from kernels_pallas.attention.tpu_blocks import LANES, LOG2_E, NOTHING, padded
from kernels_pallas.attention.tpu_forward import VMEM_BYTES, lanes, product

SPLITS = 2  # cores of a chip that has two; the others do one split after the other
FETCHED = 3  # blocks: one worked on, two arriving
BLOCK_BYTES = 2**20
TILE_ROWS = 16  # that a copy starts and ends at, in two bytes a number (8 in four)
MOST_ROWS = 256


def decode(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKE: jax.Array,
    positions_BT: jax.Array,
    factor_BT: jax.Array,
    interpret: Any = False,
    block: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """o_BTHE, float32, and the natural log-sum-exp of the scores [B,T,H], about -1e30 where nothing is seen.

    A query at position p sees slots 0..p. Query heads times T are at most `MOST_ROWS`.
    """
    batch, length, heads, width = q_BTHD.shape
    kv_heads, value_width = k_BSKD.shape[2], v_BSKE.shape[3]
    block = block or max(LANES, BLOCK_BYTES // (kv_heads * width * k_BSKD.dtype.itemsize))
    slots_a_tile = max(1, TILE_ROWS // kv_heads)
    if kv_heads > 1 and kv_heads & (kv_heads - 1) == 0:
        k_BCD, v_BCE = (padded(x, 1, slots_a_tile).reshape(batch, -1, x.shape[3]) for x in (k_BSKD, v_BSKE))
        o_BRE, log_sum_BR = _decode(q_BTHD, k_BCD, v_BCE, positions_BT, factor_BT, interpret, block, kv_heads)
        return o_BRE.reshape(batch, length, heads, value_width), log_sum_BR.reshape(batch, length, heads)
    # One head, or a number that tiles badly: XLA stores such a cache head by head, and each is then a row of its own.
    k_NSD, v_NSE = (_heads_as_rows(padded(x, 1, TILE_ROWS)) for x in (k_BSKD, v_BSKE))
    q_NTX = _heads_as_rows(q_BTHD.reshape(batch, length, kv_heads, -1))
    q_NTGD = q_NTX.reshape(batch * kv_heads, length, heads // kv_heads, width)
    positions_NT, factor_NT = (jnp.repeat(x, kv_heads, axis=0) for x in (positions_BT, factor_BT))
    found = _decode(q_NTGD, k_NSD, v_NSE, positions_NT, factor_NT, interpret, kv_heads * block, 1)
    o, log_sum = (x.reshape(batch, kv_heads, length, -1).swapaxes(1, 2) for x in found)
    return o.reshape(batch, length, heads, value_width), log_sum.reshape(batch, length, heads)


def _heads_as_rows(x_BSKD: jax.Array) -> jax.Array:
    """[B,S,K,D] -> [B*K,S,D]."""
    return x_BSKD.swapaxes(1, 2).reshape(-1, x_BSKD.shape[1], x_BSKD.shape[3])


def _decode(q_BTHD, k_BCD, v_BCE, positions_BT, factor_BT, interpret, block: int, kv_heads: int):
    """o_BRE and the log-sum-exp [B,R], rows being queries times heads; columns of k, v are slots times key heads."""
    batch, length, heads, width = q_BTHD.shape
    slots, value_width = k_BCD.shape[1] // kv_heads, v_BCE.shape[2]
    tile = max(1, TILE_ROWS // kv_heads)
    block = min(slots, -(-block // tile) * tile)
    q_BRD = q_BTHD.reshape(batch, length * heads, width)
    row_BRL = [_lanes_of(x, heads) for x in (positions_BT.astype(jnp.int32), factor_BT.astype(jnp.float32) * LOG2_E)]
    head_RL = jnp.broadcast_to(
        (jnp.arange(length * heads, dtype=jnp.int32) % heads // (heads // kv_heads))[:, None], (length * heads, LANES)
    )
    column = jnp.arange(block * kv_heads, dtype=jnp.int32)
    column_2C = jnp.stack([column // kv_heads, column % kv_heads])
    filled_B = jnp.minimum(jnp.max(positions_BT, axis=1).astype(jnp.int32) + 1, slots)
    rows = length * heads

    def of_row(split, b, *_):
        return b, 0, 0

    def always(split, b, *_):
        return 0, 0

    def of_split(split, b, *_):
        return split, b, 0, 0

    arrays = (q_BTHD, k_BCD, v_BCE, positions_BT)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    call = compat.tpu_call(
        partial(_kernel, block=block, kv_heads=kv_heads),
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=VMEM_BYTES,
        interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(SPLITS, batch),
            in_specs=[
                pl.BlockSpec((1, rows, width), of_row),
                pl.BlockSpec((1, rows, LANES), of_row),
                pl.BlockSpec((1, rows, LANES), of_row),
                pl.BlockSpec((rows, LANES), always),
                pl.BlockSpec((2, block * kv_heads), always),
                anywhere,
                anywhere,
            ],
            out_specs=[
                pl.BlockSpec((1, 1, rows, value_width), of_split),
                pl.BlockSpec((1, 1, rows, LANES), of_split),
                pl.BlockSpec((1, 1, rows, LANES), of_split),
            ],
            scratch_shapes=[
                pltpu.VMEM((FETCHED, block * kv_heads, width), k_BCD.dtype),
                pltpu.VMEM((FETCHED, block * kv_heads, value_width), v_BCE.dtype),
                pltpu.SemaphoreType.DMA((FETCHED, 2)),
            ],
        ),
        out_shape=[
            compat.struct((SPLITS, batch, rows, value_width), jnp.float32, arrays),
            compat.struct((SPLITS, batch, rows, LANES), jnp.float32, arrays),
            compat.struct((SPLITS, batch, rows, LANES), jnp.float32, arrays),
        ],
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * batch * slots * kv_heads * (width + value_width),
            transcendentals=rows * batch * slots,
            bytes_accessed=k_BCD.nbytes + v_BCE.nbytes,
        ),
        name="attention_decode",
    )
    o_NBRE, top, total = call(filled_B, q_BRD, *row_BRL, head_RL, column_2C, k_BCD, v_BCE)
    top_NBR, total_NBR = top[..., 0], total[..., 0]
    top_BR = jnp.max(top_NBR, axis=0)
    share_NBR = jnp.exp2(top_NBR - top_BR)
    total_BR = jnp.sum(share_NBR * total_NBR, axis=0)
    total_BR = jnp.where(total_BR > 0, total_BR, 1.0)
    o_BRE = jnp.sum(share_NBR[..., None] * o_NBRE, axis=0) / total_BR[..., None]
    return o_BRE, top_BR / LOG2_E + jnp.log(total_BR)


def _lanes_of(x_BT: jax.Array, heads: int) -> jax.Array:
    """[B,T] -> [B,T*H,128], the same in every lane."""
    batch, length = x_BT.shape
    return jnp.broadcast_to(x_BT[:, :, None, None], (batch, length, heads, LANES)).reshape(batch, length * heads, LANES)


def _kernel(
    filled_ref,
    q_ref,
    position_ref,
    factor_ref,
    head_ref,
    column_ref,
    k_hbm,
    v_hbm,
    o_ref,
    top_ref,
    total_ref,
    k_buffer,
    v_buffer,
    arrived,
    *,
    block: int,
    kv_heads: int,
):
    split, batch = pl.program_id(0), pl.program_id(1)
    slots = k_hbm.shape[1] // kv_heads
    blocks = jax.lax.div(filled_ref[batch] + (block - 1), block)
    steps = jax.lax.div(blocks - split + (SPLITS - 1), SPLITS)  # blocks split, split + SPLITS, ...

    def start_of(step):
        # The last block reaches back into the one before it: the cache need not be a multiple of it.
        return jnp.minimum((split + step * SPLITS) * block, slots - block)

    def copies(step):
        at = pl.ds(pl.multiple_of(start_of(step) * kv_heads, TILE_ROWS), block * kv_heads)
        buffer = jax.lax.rem(step, FETCHED)
        return (
            pltpu.make_async_copy(k_hbm.at[batch, at], k_buffer.at[buffer], arrived.at[buffer, 0]),
            pltpu.make_async_copy(v_hbm.at[batch, at], v_buffer.at[buffer], arrived.at[buffer, 1]),
        )

    def fetch(step):
        @pl.when(step < steps)
        def _start():
            for copy in copies(step):
                copy.start()

    for step in range(FETCHED - 1):
        fetch(step)
    o_ref[0, 0] = jnp.zeros(o_ref.shape[2:], jnp.float32)
    top_ref[0, 0] = jnp.full(top_ref.shape[2:], NOTHING)
    total_ref[0, 0] = jnp.zeros(total_ref.shape[2:], jnp.float32)

    def visit(step, _):
        fetch(step + FETCHED - 1)
        for copy in copies(step):
            copy.wait()
        buffer = jax.lax.rem(step, FETCHED)
        k_CD, v_CE = k_buffer[buffer], v_buffer[buffer]
        columns = k_CD.shape[0]
        slot_1C = start_of(step) + column_ref[0:1]
        seen_RC = slot_1C <= _wide(position_ref[0], columns)
        seen_RC &= column_ref[1:2] == _wide(head_ref[...], columns)
        seen_RC &= slot_1C >= (split + step * SPLITS) * block
        scores_RC = product(q_ref[0], k_CD, (1, 1)) * _wide(factor_ref[0], columns)
        scores_RC = jnp.where(seen_RC, scores_RC, NOTHING)
        top_RL = top_ref[0, 0]
        new_top_RL = jnp.maximum(top_RL, jnp.max(scores_RC, axis=1, keepdims=True))
        shrink_RL = jnp.exp2(top_RL - new_top_RL)
        weights_RC = jnp.where(seen_RC, jnp.exp2(scores_RC - _wide(new_top_RL, columns)), 0.0)
        top_ref[0, 0] = new_top_RL
        total_ref[0, 0] = shrink_RL * total_ref[0, 0] + jnp.sum(weights_RC, axis=1, keepdims=True)
        added_RE = product(weights_RC.astype(v_CE.dtype), v_CE, (1, 0))
        o_ref[0, 0] = lanes(shrink_RL, o_ref.shape[3]) * o_ref[0, 0] + added_RE
        return 0

    jax.lax.fori_loop(0, steps, visit, 0)


def _wide(column_RL: jax.Array, width: int) -> jax.Array:
    """A column's [R,128] -> [R,width], any width."""
    return lanes(column_RL, width) if width % LANES == 0 or width < LANES else column_RL[:, :1]
