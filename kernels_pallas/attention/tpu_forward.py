"""The forward kernel of softmax attention on TPU.

One grid step is a block of queries of one head. It goes through the key blocks of its span itself, fetching each while
it works on the one before: what lies above the diagonal or in another document costs neither a fetch nor a grid step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import compat
from kernels_pallas.attention.tpu_blocks import LANES, LOG2_E, NOTHING, Blocks, Rows, Tables

VMEM_BYTES = 48 * 2**20


def forward(
    blocks: Blocks,
    interpret: Any,
    q_BHTD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSE: jax.Array,
    rows: Rows,
    tables: Tables,
    dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """o_BHTE in `dtype` and the log-sum-exp float32 [B,H,1,T]: zero and `NOTHING` where a query sees nothing.

    Lengths are multiples of the blocks.
    """
    batch, heads, length, width = q_BHTD.shape
    kv_heads, keys, value_width = k_BKSD.shape[1], k_BKSD.shape[2], v_BKSE.shape[3]
    group, count = heads // kv_heads, length // blocks.queries

    # lax, because // of a scalar asks for the sign, and that for the device, which may not be here.
    def of_token(n, i, *_):
        return jax.lax.div(n, heads), 0, i

    def of_head(n, i, *_):
        return jax.lax.div(n, heads), jax.lax.rem(n, heads), i, 0

    def row_of_head(n, i, *_):
        return jax.lax.div(n, heads), jax.lax.rem(n, heads), 0, i

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    # Dense causal work; the compiler only wants an idea of it.
    flops = 2 * batch * heads * length * keys * (width + value_width) // 2
    arrays = (q_BHTD, k_BKSD, v_BKSE, rows.last_B1T)
    call = compat.tpu_call(
        partial(_kernel, blocks=blocks, heads=heads, group=group, count=count),
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=VMEM_BYTES,
        interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(batch * heads, count),
            in_specs=[
                pl.BlockSpec((1, 1, blocks.queries, width), of_head),
                *[pl.BlockSpec((1, 1, blocks.queries), of_token)] * 3,
                anywhere,
                anywhere,
                anywhere,
            ],
            out_specs=[
                pl.BlockSpec((1, 1, blocks.queries, value_width), of_head),
                pl.BlockSpec((1, 1, 1, blocks.queries), row_of_head),
            ],
            scratch_shapes=[
                pltpu.VMEM((2, blocks.keys, width), k_BKSD.dtype),
                pltpu.VMEM((2, blocks.keys, value_width), v_BKSE.dtype),
                pltpu.VMEM((2, 1, blocks.keys), jnp.int32),
                pltpu.VMEM((blocks.queries, LANES), jnp.float32),
                pltpu.VMEM((blocks.queries, LANES), jnp.int32),
                pltpu.VMEM((blocks.queries, LANES), jnp.int32),
                pltpu.VMEM((blocks.queries, LANES), jnp.float32),
                pltpu.VMEM((blocks.queries, min(blocks.part, LANES)), jnp.float32),
                pltpu.VMEM((blocks.queries, value_width), jnp.float32),
                pltpu.SemaphoreType.DMA((2, 3)),
            ],
        ),
        out_shape=[
            compat.struct((batch, heads, length, value_width), dtype, arrays),
            compat.struct((batch, heads, 1, length), jnp.float32, arrays),
        ],
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=0, bytes_accessed=2 * (q_BHTD.nbytes + k_BKSD.nbytes + v_BKSE.nbytes)
        ),
        name="attention_forward",
    )
    spans = (tables.query_first, tables.query_end, tables.query_only, tables.query_reach, tables.key_only)
    return call(*spans, q_BHTD, rows.last_B1T, rows.ids_B1T, rows.factor_B1T, k_BKSD, v_BKSE, rows.key_ids_B1S)


def column(row_1R: jax.Array) -> jax.Array:
    """[1,R] along the lanes -> [R,128], the same in every lane."""
    return jnp.broadcast_to(row_1R, (LANES, row_1R.shape[1])).T


def lanes(column_RL: jax.Array, width: int) -> jax.Array:
    """A column's [R,128] -> [R,width]; reads the same registers again."""
    if width <= LANES:
        return column_RL[:, :width]
    return jnp.tile(column_RL, (1, width // LANES))


def product(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """a b over one axis of each, accumulated in float32."""
    # Without HIGHEST, the MXU would round float32 operands to bfloat16.
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)


def _kernel(
    first_ref,
    end_ref,
    only_ref,
    reach_ref,
    key_only_ref,
    q_ref,
    last_ref,
    ids_ref,
    factor_ref,
    k_hbm,
    v_hbm,
    key_ids_hbm,
    o_ref,
    log_sum_ref,
    k_buffer,
    v_buffer,
    key_ids_buffer,
    factor_RL,
    last_RL,
    ids_RL,
    top_RL,
    total_RL,
    o_RE,
    arrived,
    *,
    blocks: Blocks,
    heads: int,
    group: int,
    count: int,
):
    batch, head = jax.lax.div(pl.program_id(0), heads), jax.lax.div(jax.lax.rem(pl.program_id(0), heads), group)
    i = pl.program_id(1)
    key_blocks = key_ids_hbm.shape[2] // blocks.keys
    block = batch * count + i
    first, end = first_ref[block], end_ref[block]

    def copies(j, slot):
        at = pl.ds(pl.multiple_of(j * blocks.keys, blocks.keys), blocks.keys)
        return (
            pltpu.make_async_copy(k_hbm.at[batch, head, at], k_buffer.at[slot], arrived.at[slot, 0]),
            pltpu.make_async_copy(v_hbm.at[batch, head, at], v_buffer.at[slot], arrived.at[slot, 1]),
            pltpu.make_async_copy(key_ids_hbm.at[batch, :, at], key_ids_buffer.at[slot], arrived.at[slot, 2]),
        )

    @pl.when(first < end)
    def _fetch_first():
        for copy in copies(first, 0):
            copy.start()

    # Powers of two are cheaper than powers of e.
    last_RL[...], ids_RL[...], factor_RL[...] = column(last_ref[0]), column(ids_ref[0]), column(factor_ref[0] * LOG2_E)
    top_RL[...] = jnp.full_like(top_RL, NOTHING)
    total_RL[...] = jnp.zeros_like(total_RL)
    o_RE[...] = jnp.zeros_like(o_RE)

    def visit(j, slot, masked):
        q_RD = q_ref[0, 0]
        for start in range(0, blocks.keys, blocks.part):
            at = pl.ds(start, blocks.part)
            scores_RJ = product(q_RD, k_buffer[slot, at], (1, 1)) * lanes(factor_RL[...], blocks.part)
            if masked:
                places = j * blocks.keys + start + jax.lax.broadcasted_iota(jnp.int32, scores_RJ.shape, 1)
                seen = places <= lanes(last_RL[...], blocks.part)
                seen &= key_ids_buffer[slot, :, at] == lanes(ids_RL[...], blocks.part)
                scores_RJ = jnp.where(seen, scores_RJ, NOTHING)
            top = top_RL[...]
            new_top = jnp.maximum(top, jnp.max(scores_RJ, axis=1, keepdims=True))
            shrink = jnp.exp2(top - new_top)
            weights_RJ = jnp.exp2(scores_RJ - lanes(new_top, blocks.part))
            top_RL[...] = new_top
            across = total_RL.shape[1]
            sums = sum(weights_RJ[:, n : n + across] for n in range(0, blocks.part, across))
            total_RL[...] = lanes(shrink, across) * total_RL[...] + sums
            added = product(weights_RJ.astype(v_buffer.dtype), v_buffer[slot, at], (1, 0))
            o_RE[...] = lanes(shrink, o_RE.shape[1]) * o_RE[...] + added

    def key_block(j, _):
        slot = jax.lax.rem(j - first, 2)

        @pl.when(j + 1 < end)
        def _fetch_next():
            for copy in copies(j + 1, 1 - slot):
                copy.start()

        for copy in copies(j, slot):
            copy.wait()
        whole = only_ref[block] == key_only_ref[batch * key_blocks + j]
        whole &= (j + 1) * blocks.keys <= reach_ref[block] + 1
        pl.when(whole)(lambda: visit(j, slot, False))
        pl.when(~whole)(lambda: visit(j, slot, True))
        return 0

    jax.lax.fori_loop(first, end, key_block, 0)
    total = jnp.sum(total_RL[...], axis=1, keepdims=True)
    sees = top_RL[...] > NOTHING / 2
    total = jnp.where(sees, total, 1.0)
    inverse = jnp.where(sees, 1.0 / total, 0.0)
    o_ref[0, 0] = (o_RE[...] * lanes(inverse, o_RE.shape[1])).astype(o_ref.dtype)
    log_sum = jnp.where(sees, (top_RL[...] + jnp.log2(total)) / LOG2_E, NOTHING)
    log_sum_ref[0, 0] = log_sum.T[:1]
