"""The forward kernel of softmax attention on TPU.

One grid step is a block of queries of one head. It goes through the key blocks of its span itself, fetching each while
it works on the one before: what lies above the diagonal or in another document costs neither a fetch nor a grid step.
Within a pair of blocks it goes tile by tile, past those that do not meet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import compat
from kernels_pallas.attention.tpu_blocks import LANES, LOG2_E, NOTHING, Blocks, Rows, Tables

VMEM_BYTES = 48 * 2**20
STRIP = 256  # queries that a block's rows are begun and finished for at a time


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

    Lengths are multiples of the blocks, and `blocks.queries` of the tables' grain.
    """
    batch, heads, length, width = q_BHTD.shape
    kv_heads, keys, value_width = k_BKSD.shape[1], k_BKSD.shape[2], v_BKSE.shape[3]
    group, count = heads // kv_heads, length // blocks.queries
    grain = batch * length // tables.query_first.shape[0]

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
        partial(_kernel, blocks=blocks, heads=heads, group=group, grain=grain),
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


def smallest(ref: Any, start: jax.Array, count: int) -> jax.Array:
    """Of `count` scalars of a table."""
    return reduce(jnp.minimum, [ref[start + n] for n in range(count)])


def largest(ref: Any, start: jax.Array, count: int) -> jax.Array:
    return reduce(jnp.maximum, [ref[start + n] for n in range(count)])


def repeat(count: int, body: Callable[[Any], None]) -> None:
    """A loop, for its code is compiled once; none where it would run once."""
    if count == 1:
        body(0)
    else:
        jax.lax.fori_loop(0, count, lambda n, _: body(n), None)


def strip(n: Any, size: int) -> Any:
    """The n-th `size` of an axis."""
    return pl.ds(pl.multiple_of(n * size, size), size)


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
    grain: int,
):
    batch, head = jax.lax.div(pl.program_id(0), heads), jax.lax.div(jax.lax.rem(pl.program_id(0), heads), group)
    grains, parts = blocks.queries // grain, blocks.keys // blocks.part
    block = (batch * pl.num_programs(1) + pl.program_id(1)) * grains
    key_grains = batch * (key_ids_hbm.shape[2] // blocks.part)
    first = jax.lax.div(smallest(first_ref, block, grains), parts)
    end = jax.lax.div(largest(end_ref, block, grains) + parts - 1, parts)

    def copies(j, slot):
        at = strip(j, blocks.keys)
        return (
            pltpu.make_async_copy(k_hbm.at[batch, head, at], k_buffer.at[slot], arrived.at[slot, 0]),
            pltpu.make_async_copy(v_hbm.at[batch, head, at], v_buffer.at[slot], arrived.at[slot, 1]),
            pltpu.make_async_copy(key_ids_hbm.at[batch, :, at], key_ids_buffer.at[slot], arrived.at[slot, 2]),
        )

    @pl.when(first < end)
    def _fetch_first():
        for copy in copies(first, 0):
            copy.start()

    size = min(STRIP, blocks.queries)

    def begin(n):
        at = strip(n, size)
        # Powers of two are cheaper than powers of e.
        factor_RL[at] = column(factor_ref[0, :, at] * LOG2_E)
        last_RL[at], ids_RL[at] = column(last_ref[0, :, at]), column(ids_ref[0, :, at])
        for ref, value in ((top_RL, NOTHING), (total_RL, 0.0), (o_RE, 0.0)):
            ref[at] = jnp.full((size, ref.shape[1]), value, jnp.float32)

    repeat(blocks.queries // size, begin)

    def visit(j, slot, at_R, start, width, masked):
        """The queries `at_R`, and `width` keys of block j from `start`."""
        q_RD, part = q_ref[0, 0, at_R], blocks.part
        for place in range(0, width, part):
            at_J = pl.ds(pl.multiple_of(start + place, part), part)
            scores_RJ = product(q_RD, k_buffer[slot, at_J], (1, 1)) * lanes(factor_RL[at_R], part)
            if masked:
                places = j * blocks.keys + start + place + jax.lax.broadcasted_iota(jnp.int32, scores_RJ.shape, 1)
                seen = places <= lanes(last_RL[at_R], part)
                seen &= key_ids_buffer[slot, :, at_J] == lanes(ids_RL[at_R], part)
                scores_RJ = jnp.where(seen, scores_RJ, NOTHING)
            top = top_RL[at_R]
            new_top = jnp.maximum(top, jnp.max(scores_RJ, axis=1, keepdims=True))
            shrink = jnp.exp2(top - new_top)
            weights_RJ = jnp.exp2(scores_RJ - lanes(new_top, part))
            top_RL[at_R] = new_top
            across = total_RL.shape[1]
            sums = sum(weights_RJ[:, n : n + across] for n in range(0, part, across))
            total_RL[at_R] = lanes(shrink, across) * total_RL[at_R] + sums
            added = product(weights_RJ.astype(v_buffer.dtype), v_buffer[slot, at_J], (1, 0))
            o_RE[at_R] = lanes(shrink, o_RE.shape[1]) * o_RE[at_R] + added

    def in_tiles(j, slot):
        def tile(n):
            row, part = jax.lax.div(n, parts), jax.lax.rem(n, parts)
            meets = first_ref[block + row] <= j * parts + part
            meets &= j * parts + part < end_ref[block + row]
            pl.when(meets)(lambda: visit(j, slot, strip(row, grain), part * blocks.part, blocks.part, True))

        repeat(grains * parts, tile)

    def whole(j):
        """Whether every query of this block sees every key of block j."""
        ids = [only_ref[block + n] for n in range(grains)]
        ids += [key_only_ref[key_grains + j * parts + n] for n in range(parts)]
        one = reduce(jnp.logical_and, [x == ids[0] for x in ids[1:]])
        return one & ((j + 1) * blocks.keys <= smallest(reach_ref, block, grains) + 1)

    def key_block(j, _):
        slot = jax.lax.rem(j - first, 2)

        @pl.when(j + 1 < end)
        def _fetch_next():
            for copy in copies(j + 1, 1 - slot):
                copy.start()

        for copy in copies(j, slot):
            copy.wait()
        plain = whole(j)
        pl.when(plain)(lambda: visit(j, slot, slice(None), 0, blocks.keys, False))
        pl.when(~plain)(lambda: in_tiles(j, slot))

    jax.lax.fori_loop(first, end, key_block, None)

    def finish(n):
        at = strip(n, size)
        total = jnp.sum(total_RL[at], axis=1, keepdims=True)
        sees = top_RL[at] > NOTHING / 2
        total = jnp.where(sees, total, 1.0)
        inverse = jnp.where(sees, 1.0 / total, 0.0)
        o_ref[0, 0, at] = (o_RE[at] * lanes(inverse, o_RE.shape[1])).astype(o_ref.dtype)
        log_sum = jnp.where(sees, (top_RL[at] + jnp.log2(total)) / LOG2_E, NOTHING)
        log_sum_ref[0, 0, :, at] = log_sum.T[:1]

    repeat(blocks.queries // size, finish)
