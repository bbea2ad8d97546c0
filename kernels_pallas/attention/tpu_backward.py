"""The backward kernel of softmax attention on TPU.

One grid step is a block of keys of one key head. It goes through the query blocks that see it, of all of the head's
query heads, so that dk and dv are summed in VMEM; scores are computed once, transposed ([keys, queries]: what is known
of a query then lies along the lanes). dq is summed over the key blocks in a float32 array in HBM that holds the queries
of one key head and is used again for the next: it is read and written while another block is worked on.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import compat
from kernels_pallas.attention.tpu_blocks import LANES, LOG2_E, Blocks, Rows, Tables
from kernels_pallas.attention.tpu_forward import VMEM_BYTES, column, lanes, largest, product, repeat, smallest

DQ_SLOTS = 3  # one worked on, one arriving, one leaving
# Of a query block, log-sum-exp and inner of a head, last key, id and factor
ROWS = (jnp.float32, jnp.float32, jnp.int32, jnp.int32, jnp.float32)


def backward(
    blocks: Blocks,
    interpret: Any,
    q_BHTD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSE: jax.Array,
    do_BHTE: jax.Array,
    log_sum_BH1T: jax.Array,
    inner_BH1T: jax.Array,
    rows: Rows,
    tables: Tables,
    dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv in `dtype`. `inner` is sum(o * do) less the cotangent of the log-sum-exp."""
    batch, heads, length, width = q_BHTD.shape
    kv_heads, keys, value_width = k_BKSD.shape[1], k_BKSD.shape[2], v_BKSE.shape[3]
    group, query_blocks = heads // kv_heads, length // blocks.queries
    # A chip may have two cores, and each needs its own sums: the first axis of the grid is split between them.
    cores = 2 if batch * kv_heads % 2 == 0 else 1
    a_core = batch * kv_heads // cores

    def of_key(core, n, j, *_):
        return jax.lax.div(core * a_core + n, kv_heads), 0, j

    def of_head(core, n, j, *_):
        return jax.lax.div(core * a_core + n, kv_heads), jax.lax.rem(core * a_core + n, kv_heads), j, 0

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    k_block = pl.BlockSpec((1, 1, blocks.keys, width), of_head)
    v_block = pl.BlockSpec((1, 1, blocks.keys, value_width), of_head)
    prefetched = (
        tables.query_only,
        tables.query_reach,
        tables.key_first,
        tables.key_end,
        tables.key_only,
        tables.visited_first,
        tables.visited_end,
    )
    arrays = (q_BHTD, k_BKSD, v_BKSE, do_BHTE, rows.last_B1T)
    call = compat.tpu_call(
        partial(_kernel, blocks=blocks, group=group, kv_heads=kv_heads, a_core=a_core, query_blocks=query_blocks),
        dimension_semantics=("parallel", "arbitrary", "arbitrary"),
        vmem_limit_bytes=VMEM_BYTES,
        interpret=interpret,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(cores, a_core, keys // blocks.keys),
            in_specs=[
                k_block,
                v_block,
                pl.BlockSpec((1, 1, blocks.keys), of_key),
                *[anywhere] * 8,
            ],
            out_specs=[k_block, v_block, anywhere, anywhere],
            scratch_shapes=[
                pltpu.VMEM((2, blocks.queries, width), q_BHTD.dtype),
                pltpu.VMEM((2, blocks.queries, value_width), do_BHTE.dtype),
                *[pltpu.VMEM((2, 1, blocks.queries), x) for x in ROWS],
                pltpu.VMEM((DQ_SLOTS, blocks.queries, width), jnp.float32),
                pltpu.VMEM((blocks.queries, width), dtype),
                pltpu.VMEM((blocks.keys, width), jnp.float32),
                pltpu.VMEM((blocks.keys, value_width), jnp.float32),
                pltpu.VMEM((blocks.keys, LANES), jnp.int32),
                pltpu.SemaphoreType.DMA((2, 2 + len(ROWS))),
                pltpu.SemaphoreType.DMA((DQ_SLOTS,)),
                pltpu.SemaphoreType.DMA((DQ_SLOTS,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[
            compat.struct(k_BKSD.shape, dtype, arrays),
            compat.struct(v_BKSE.shape, dtype, arrays),
            compat.struct(q_BHTD.shape, dtype, arrays),
            compat.struct((cores, group, length, width), jnp.float32, arrays),
        ],
        # Query blocks that see nothing are visited by no one: their dq is the zeros that it starts from.
        input_output_aliases={len(prefetched) + 10: 2},
        cost_estimate=pl.CostEstimate(
            flops=batch * heads * length * keys * (3 * width + 2 * value_width),
            transcendentals=batch * heads * length * keys // 2,
            bytes_accessed=4 * q_BHTD.nbytes + 2 * (k_BKSD.nbytes + v_BKSE.nbytes),
        ),
        name="attention_backward",
    )
    axes = frozenset().union(*(compat.varying_axes(x) for x in arrays))
    zeros = compat.vary(jnp.zeros(q_BHTD.shape, dtype), axes)
    inputs = (k_BKSD, v_BKSE, rows.key_ids_B1S, q_BHTD, do_BHTE, log_sum_BH1T, inner_BH1T, *rows[:3], zeros)
    dk, dv, dq, _ = call(*prefetched, *inputs)
    return dq, dk, dv


def _kernel(
    only_ref,
    reach_ref,
    first_ref,
    end_ref,
    key_only_ref,
    visited_first_ref,
    visited_end_ref,
    k_ref,
    v_ref,
    key_ids_ref,
    q_hbm,
    do_hbm,
    log_sum_hbm,
    inner_hbm,
    last_hbm,
    ids_hbm,
    factor_hbm,
    zeros_hbm,
    dk_ref,
    dv_ref,
    dq_hbm,
    dq_sums_hbm,
    q_buffer,
    do_buffer,
    log_sum_buffer,
    inner_buffer,
    last_buffer,
    ids_buffer,
    factor_buffer,
    dq_buffer,
    dq_rounded,
    dk_JD,
    dv_JE,
    key_ids_JL,
    arrived,
    dq_arrived,
    dq_left,
    dq_rounded_left,
    *,
    blocks: Blocks,
    group: int,
    kv_heads: int,
    a_core: int,
    query_blocks: int,
):
    del zeros_hbm  # dq_hbm, under another name
    core, j = pl.program_id(0), pl.program_id(2)
    row = core * a_core + pl.program_id(1)
    batch, kv_head = jax.lax.div(row, kv_heads), jax.lax.rem(row, kv_heads)
    # The tables tell of query blocks and of a part of the keys.
    parts = blocks.keys // blocks.part
    grain = (batch * pl.num_programs(2) + j) * parts
    first = smallest(first_ref, grain, parts)
    span = largest(end_ref, grain, parts) - first
    steps = span * group

    def place(step):
        """The head of the group, the query block, and where its tokens are."""
        i = first + jax.lax.rem(step, span)
        return jax.lax.div(step, span), i, pl.ds(pl.multiple_of(i * blocks.queries, blocks.queries), blocks.queries)

    def inputs(step):
        n, _, at = place(step)
        slot, head = jax.lax.rem(step, 2), kv_head * group + n
        sources = (
            q_hbm.at[batch, head, at],
            do_hbm.at[batch, head, at],
            log_sum_hbm.at[batch, head, :, at],
            inner_hbm.at[batch, head, :, at],
            *(x.at[batch, :, at] for x in (last_hbm, ids_hbm, factor_hbm)),
        )
        buffers = (q_buffer, do_buffer, log_sum_buffer, inner_buffer, last_buffer, ids_buffer, factor_buffer)
        return [
            pltpu.make_async_copy(source, buffer.at[slot], arrived.at[slot, n])
            for n, (source, buffer) in enumerate(zip(sources, buffers, strict=True))
        ]

    def dq_in(step):
        n, _, at = place(step)
        slot = jax.lax.rem(step, DQ_SLOTS)
        return pltpu.make_async_copy(dq_sums_hbm.at[core, n, at], dq_buffer.at[slot], dq_arrived.at[slot])

    def dq_out(step):
        n, _, at = place(step)
        slot = jax.lax.rem(step, DQ_SLOTS)
        return pltpu.make_async_copy(dq_buffer.at[slot], dq_sums_hbm.at[core, n, at], dq_left.at[slot])

    def result_out(step):
        n, _, at = place(step)
        return pltpu.make_async_copy(dq_rounded, dq_hbm.at[batch, kv_head * group + n, at], dq_rounded_left)

    def begins(step):
        return visited_first_ref[batch * query_blocks + place(step)[1]] == j

    def finishes(step):
        return visited_end_ref[batch * query_blocks + place(step)[1]] == j + 1

    def fetch(step):
        for copy in inputs(step):
            copy.start()
        pl.when(~begins(step))(lambda: dq_in(step).start())

    def wait_until_left(step):
        pl.when(~finishes(step))(lambda: dq_out(step).wait())

    def visit(step, start, width, masked):
        """All queries of a step, and `width` keys from `start`."""
        slot, dq_slot = jax.lax.rem(step, 2), jax.lax.rem(step, DQ_SLOTS)
        q_RD, do_RE = q_buffer[slot], do_buffer[slot]
        log_sum_1R, inner_1R = log_sum_buffer[slot] * LOG2_E, inner_buffer[slot]
        last_1R, ids_1R, factor_1R = last_buffer[slot], ids_buffer[slot], factor_buffer[slot]
        for place in range(0, width, blocks.part):
            at = pl.ds(pl.multiple_of(start + place, blocks.part), blocks.part)
            k_JD = k_ref[0, 0, at]
            scores_JR = product(k_JD, q_RD, (1, 1)) * (factor_1R * LOG2_E)
            weights_JR = jnp.exp2(scores_JR - log_sum_1R)
            if masked:
                places = j * blocks.keys + start + place + jax.lax.broadcasted_iota(jnp.int32, scores_JR.shape, 0)
                seen = (places <= last_1R) & (lanes(key_ids_JL[at], blocks.queries) == ids_1R)
                weights_JR = jnp.where(seen, weights_JR, 0.0)
            dv_JE[at] += product(weights_JR.astype(do_RE.dtype), do_RE, (1, 0))
            dweights_JR = product(v_ref[0, 0, at], do_RE, (1, 1))
            dscores_JR = (weights_JR * (dweights_JR - inner_1R) * factor_1R).astype(q_RD.dtype)
            dk_JD[at] += product(dscores_JR, q_RD, (1, 0))
            dq_buffer[dq_slot] += product(dscores_JR, k_JD, (0, 0))

    def in_parts(step):
        def part(n):
            i = place(step)[1]
            meets = (first_ref[grain + n] <= i) & (i < end_ref[grain + n])
            pl.when(meets)(lambda: visit(step, n * blocks.part, blocks.part, True))

        repeat(parts, part)

    def whole(step):
        """Whether every query of this step sees every key of this block."""
        block = batch * query_blocks + place(step)[1]
        one = reduce(jnp.logical_and, [only_ref[block] == key_only_ref[grain + n] for n in range(parts)])
        return one & ((j + 1) * blocks.keys <= reach_ref[block] + 1)

    def query_block(step, rounded_leaving):
        dq_slot = jax.lax.rem(step, DQ_SLOTS)
        pl.when(step >= 2)(lambda: wait_until_left(step - 2))
        pl.when(step + 1 < steps)(lambda: fetch(step + 1))

        @pl.when(begins(step))
        def _zero():
            dq_buffer[dq_slot] = jnp.zeros(dq_buffer.shape[1:], jnp.float32)

        for copy in inputs(step):
            copy.wait()
        pl.when(~begins(step))(lambda: dq_in(step).wait())
        plain = whole(step)
        pl.when(plain)(lambda: visit(step, 0, blocks.keys, False))
        pl.when(~plain)(lambda: in_parts(step))
        finished = finishes(step)
        pl.when(~finished)(lambda: dq_out(step).start())

        @pl.when(finished)
        def _finish():
            pl.when(rounded_leaving)(lambda: result_out(step).wait())
            dq_rounded[...] = dq_buffer[dq_slot].astype(dq_rounded.dtype)
            result_out(step).start()

        return rounded_leaving | finished

    dk_JD[...], dv_JE[...] = jnp.zeros_like(dk_JD), jnp.zeros_like(dv_JE)

    @pl.when(steps > 0)
    def _sum():
        key_ids_JL[...] = column(key_ids_ref[0])
        fetch(0)
        rounded_leaving = jax.lax.fori_loop(0, steps, query_block, False)
        pl.when(steps > 1)(lambda: wait_until_left(steps - 2))
        wait_until_left(steps - 1)
        pl.when(rounded_leaving)(lambda: result_out(0).wait())

    dk_ref[0, 0], dv_ref[0, 0] = dk_JD[...].astype(dk_ref.dtype), dv_JE[...].astype(dv_ref.dtype)
