"""The Lightning recurrence as Mosaic TPU kernels: one pass over the tokens, the state in VMEM.

Three sweeps over chunks of 128 tokens, with the mathematics of `marks`: o forwards; dq forwards, which recomputes the
states; dk, dv and the initial state's gradient backwards. No state goes through HBM, so a forward moves 4 tensors and a
backward 10. Each grid step is one row, one head and some chunks; the grid's last axis runs in order.

Without marks one decay table serves every chunk of a head: it is built at the head's first step and kept in VMEM. The
last step may have tokens beyond the end, where memory holds anything; it takes the marked path, with marks that it
makes itself.

Arrays are [B,H,T,D] here. XLA lets the producers write that order, so the transpose costs nothing inside a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import compat
from kernels_pallas.dispatch import Backend
from kernels_pallas.lightning.marks import Decay, Marks, marks
from kernels_pallas.lightning.recurrence import Options, Passes, backend_function

CHUNK = 128
READS, WRITES, KEEPS, FLAG_BITS = 1, 2, 4, 3
WIDEST = 256
WIDE_STATE_BYTES = 2**17  # beyond it half as much is unrolled, lest the compiler's temporaries fill VMEM
VMEM_BYTES = 16 * 2**20  # what a kernel may use unless it asks for more; the chips have several times as much


class Blocks(NamedTuple):
    """How a row is cut: `chunks` a grid step, of which `unrolled` are scheduled together."""

    chunks: int = 16
    unrolled: int = 8


class Tables(NamedTuple):
    """The decays of one chunk (module docstring of `marks`); the output's scale is in `intra` and `read`."""

    intra_CC: jax.Array  # D, or its transpose where the sweep wants that
    read: jax.Array  # [C,1], or [C,C] of equal columns, which spares spreading each row over the lanes
    write: jax.Array
    keep_11: jax.Array


class Sweep(NamedTuple):
    """One kernel: `step(dot, state, tables, *inputs)` gives the state after a chunk and the chunk's outputs."""

    name: str
    step: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]]
    backwards: bool
    transposed: bool  # `step` wants the table D transposed
    gives_state: bool
    products: int  # matrix products of 128 x K x V a chunk, for the cost estimate


class Plan(NamedTuple):
    """What is known when a kernel is compiled."""

    sweep: Sweep
    length: int
    blocks: Blocks
    scale: float
    dtype: Any  # of the operands of matrix products
    marked: bool


def _spread(x: jax.Array, width: int) -> jax.Array:
    """[C,1] as it is, [C,C] of equal columns as [C,width]."""
    if x.shape[1] == 1 or x.shape[1] == width:
        return x
    return x[:, :width] if width < x.shape[1] else jnp.concatenate([x] * -(-width // x.shape[1]), axis=1)[:, :width]


def _rows(factors: jax.Array, x_CD: jax.Array) -> jax.Array:
    """Each row times its factor."""
    return _spread(factors, x_CD.shape[1]) * x_CD


def _output_step(dot, state_KV, tables: Tables, q, k, v):
    dtype = q.dtype
    scores = (dot(q, k, 1, 1) * tables.intra_CC).astype(dtype)
    o = dot(scores, v, 1, 0) + _rows(tables.read, dot(q, state_KV.astype(dtype), 1, 0))
    written = dot(_rows(tables.write, k).astype(dtype), v, 0, 0)
    return tables.keep_11 * state_KV + written, (o,)


def _dq_step(dot, state_KV, tables: Tables, k, v, do):
    dtype = k.dtype
    dscores = (dot(do, v, 1, 1) * tables.intra_CC).astype(dtype)
    dq = dot(dscores, k, 1, 0) + _rows(tables.read, dot(do, state_KV.astype(dtype), 1, 1))
    written = dot(_rows(tables.write, k).astype(dtype), v, 0, 0)
    return tables.keep_11 * state_KV + written, (dq,)


def _dkv_step(dot, dstate_KV, tables: Tables, q, k, v, do):
    """`dstate_KV` is the gradient in the state after the chunk, then in the one before. The table is transposed."""
    dtype = q.dtype
    scores = (dot(k, q, 1, 1) * tables.intra_CC).astype(dtype)
    dscores = (dot(v, do, 1, 1) * tables.intra_CC).astype(dtype)
    ds = dstate_KV.astype(dtype)
    dk = dot(dscores, q, 1, 0) + _rows(tables.write, dot(v, ds, 1, 1))
    # Two products with `do` in one: it is loaded into the matrix unit once.
    from_do = dot(jnp.concatenate([scores, _rows(tables.read, q).astype(dtype).T]), do, 1, 0)
    dv = from_do[:CHUNK] + _rows(tables.write, dot(k, ds, 1, 0))
    return tables.keep_11 * dstate_KV + from_do[CHUNK:], (dk, dv)


OUTPUT = Sweep("lightning_forward", _output_step, False, False, True, 4)
DQ = Sweep("lightning_dq", _dq_step, False, False, False, 4)
DKV = Sweep("lightning_dkv", _dkv_step, True, True, True, 7)


def _dot(a, b, contract_a: int, contract_b: int):
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)


def _plain_intra(plan: Plan, slope):
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (0, 1))
    lag = (column - row if plan.sweep.transposed else row - column).astype(jnp.float32)
    return jnp.where(lag >= 0, plan.scale * jnp.exp(-slope * jnp.maximum(lag, 0.0)), 0.0)


def _plain_tables(plan: Plan, slope, intra_CC) -> Tables:
    """The tables of a chunk of one document without padding."""
    place = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, 1), 0).astype(jnp.float32)
    read, write = plan.scale * jnp.exp(-slope * (place + 1)), jnp.exp(-slope * (CHUNK - 1 - place))
    return Tables(intra_CC, read, write, jnp.exp(-slope * jnp.full((1, 1), CHUNK, jnp.float32)))


def _tail_marks(slope, left):
    """Marks of a chunk with `left` tokens before the row's end (any integer): lag and flags [1,C]."""
    place = jax.lax.broadcasted_iota(jnp.int32, (1, CHUNK), 1)
    count = jnp.minimum(place + 1, jnp.maximum(left, 0)).astype(jnp.float32)
    return slope * count, jnp.where(place < left, READS | WRITES | KEEPS, KEEPS - (1 << FLAG_BITS))


def _marked_tables(plan: Plan, lag_1C, flags_1C) -> tuple[Tables, jax.Array]:
    """The tables of any chunk, and the flags down the columns of [C,C]: negative where a token is not real."""
    square = (CHUNK, CHUNK)
    across, down = jnp.broadcast_to(lag_1C, square), jnp.broadcast_to(lag_1C, square).T
    flags_across, flags_down = jnp.broadcast_to(flags_1C, square), jnp.broadcast_to(flags_1C, square).T
    row, column = (jax.lax.broadcasted_iota(jnp.int32, square, axis) for axis in (0, 1))
    lag, causal = (across - down, column >= row) if plan.sweep.transposed else (down - across, row >= column)
    document = flags_down >> FLAG_BITS
    seen = causal & (document == flags_across >> FLAG_BITS) & (document >= 0)
    intra = jnp.where(seen, plan.scale * jnp.exp(-jnp.maximum(lag, 0.0)), 0.0)
    total_11 = lag_1C[:, CHUNK - 1 :]
    read = jnp.where(flags_down & READS > 0, plan.scale * jnp.exp(-down), 0.0)
    write = jnp.where(flags_down & WRITES > 0, jnp.exp(-(total_11 - down)), 0.0)
    keep = jnp.where(flags_1C[:, :1] & KEEPS > 0, jnp.exp(-total_11), 0.0)
    return Tables(intra, read, write, keep), flags_down


def _each_chunk(plan: Plan, do_chunk: Callable[[Any], None]) -> None:
    """Calls `do_chunk` on the step's chunks in the sweep's order, in unrolled groups."""
    chunks, unrolled = plan.blocks

    def group(i, nothing):
        for j in range(unrolled):
            c = i * unrolled + j
            do_chunk(chunks - 1 - c if plan.sweep.backwards else c)
        return nothing

    if chunks == unrolled:
        group(0, None)
    else:
        jax.lax.fori_loop(0, chunks // unrolled, group, None)


def _kernel(plan: Plan, inputs: int, *refs) -> None:
    """Refs: the decay (slopes in SMEM, or lag and flags), `inputs` token blocks, the state before, outputs, scratch."""
    decays = 2 if plan.marked else 1
    decay_refs, input_refs, start_ref = refs[:decays], refs[decays : decays + inputs], refs[decays + inputs]
    outputs, (state_ref, intra_ref) = refs[decays + inputs + 1 : -2], refs[-2:]
    step, last = pl.program_id(2), pl.num_programs(2) - 1
    block = last - step if plan.sweep.backwards else step
    slope = None if plan.marked else decay_refs[0][pl.program_id(1)]

    @pl.when(step == 0)
    def _():
        state_ref[...] = start_ref[0, 0]
        if not plan.marked:
            intra_ref[...] = _plain_intra(plan, slope)

    def chunk(c, tables: Tables, flags_CC=None) -> None:
        rows = pl.ds(c * CHUNK, CHUNK)
        values = [ref[0, 0, rows, :].astype(plan.dtype) for ref in input_refs]
        if flags_CC is not None:
            # Where a token is not real its memory may hold anything, and 0 * NaN is NaN.
            real = [_spread(flags_CC, x.shape[1]) >= 0 for x in values]
            values = [
                jnp.where(r, x.astype(jnp.float32), 0.0).astype(plan.dtype) for r, x in zip(real, values, strict=True)
            ]
        state_ref[...], results = plan.sweep.step(_dot, state_ref[...], tables, *values)
        for ref, result in zip(outputs, results, strict=False):
            ref[0, 0, rows, :] = result.astype(ref.dtype)

    def marked(c) -> None:
        lag_1C, flags_1C = decay_refs[0][0, 0, pl.ds(c, 1), :], decay_refs[1][0, pl.ds(c, 1), :]
        chunk(c, *_marked_tables(plan, lag_1C, flags_1C))

    def tail(c) -> None:
        left = plan.length - (block * plan.blocks.chunks + c) * CHUNK
        chunk(c, *_marked_tables(plan, *_tail_marks(slope, left)))

    if plan.marked:
        _each_chunk(plan, marked)
    else:
        whole = partial(chunk, tables=_plain_tables(plan, slope, intra_ref[...]))
        if plan.length % (plan.blocks.chunks * CHUNK) == 0:
            _each_chunk(plan, whole)
        else:
            pl.when(block < last)(lambda: _each_chunk(plan, whole))
            pl.when(block == last)(lambda: _each_chunk(plan, tail))
    if plan.sweep.gives_state:

        @pl.when(step == last)
        def _():
            outputs[-1][0, 0] = state_ref[...]


def _sweep(
    sweep: Sweep, options: Options, blocks: Blocks, decay, inputs: Sequence[jax.Array], state, outs: Sequence[Any]
):
    """Runs a sweep on arrays [B,H,T,D]; `outs` are (width, dtype) of the outputs."""
    batch, heads, length = inputs[0].shape[:3]
    dtype = jnp.float32 if options.high else jnp.result_type(*inputs)
    wide = state.shape[2] * state.shape[3] * jnp.dtype(dtype).itemsize > WIDE_STATE_BYTES
    blocks = _fitted(Blocks(max(blocks.chunks // 2, 1), max(blocks.unrolled // 2, 1)) if wide else blocks, length)
    tokens = blocks.chunks * CHUNK
    steps = -(-length // tokens)
    plan = Plan(sweep, length, blocks, options.scale, dtype, isinstance(decay, tuple))

    def at(t):
        return steps - 1 - t if sweep.backwards else t

    def by_token(width):
        return pl.BlockSpec((1, 1, tokens, width), lambda b, h, t: (b, h, at(t), 0))

    by_head = pl.BlockSpec((1, 1, *state.shape[2:]), lambda b, h, t: (b, h, 0, 0))
    if plan.marked:
        decays, decay_specs = _marked_operands(decay, blocks.chunks, at)
    else:
        decays, decay_specs = (decay,), [pl.BlockSpec(memory_space=pltpu.SMEM)]
    operands: tuple[jax.Array, ...] = (*decays, *inputs, state)
    axes = frozenset().union(*(compat.varying_axes(x) for x in operands))
    operands = tuple(compat.vary(x, axes) for x in operands)
    out_specs, out_shape = [], []
    for width, out_dtype in outs:
        out_specs.append(by_token(width))
        out_shape.append(compat.struct((batch, heads, length, width), out_dtype, operands))
    if sweep.gives_state:
        out_specs.append(by_head)
        out_shape.append(compat.struct(state.shape, jnp.float32, operands))
    shapes: list[Any] = [*operands, *out_shape]
    moved = sum(x.size * x.dtype.itemsize for x in shapes)
    flops = 2 * batch * heads * length * sweep.products * state.shape[2] * state.shape[3]
    # Each block twice, so that the next is fetched meanwhile, and the compiler's own temporaries.
    widths = [*(x.shape[-1] * x.dtype.itemsize for x in inputs), *(w * jnp.dtype(d).itemsize for w, d in outs)]
    vmem = 2 * tokens * sum(widths) + VMEM_BYTES // 2
    return compat.tpu_call(
        partial(_kernel, plan, len(inputs)),
        vmem_limit_bytes=max(vmem, VMEM_BYTES),
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        interpret=options.interpret,
        grid=(batch, heads, steps),
        in_specs=[*decay_specs, *(by_token(x.shape[-1]) for x in inputs), by_head],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM(state.shape[2:], jnp.float32), pltpu.VMEM((CHUNK, CHUNK), jnp.float32)],
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
        name=sweep.name,
    )(*operands)


def _fitted(blocks: Blocks, length: int) -> Blocks:
    """All of a row's chunks at once where they are few, else whole groups."""
    needed = -(-length // CHUNK)
    if needed <= blocks.unrolled:
        return Blocks(needed, needed)
    return blocks._replace(chunks=min(blocks.chunks, -(-needed // blocks.unrolled) * blocks.unrolled))


def _marked_operands(decay: tuple[jax.Array, jax.Array], chunks: int, at):
    """Lag [b,h,N,C] and flags [b,N,C] filled up to whole steps with padding, and their blocks."""
    lag, flags = decay
    fill = -flags.shape[1] % chunks
    lag = jnp.pad(lag, ((0, 0), (0, 0), (0, fill), (0, 0)))
    flags = jnp.pad(flags, ((0, 0), (0, fill), (0, 0)), constant_values=KEEPS - (1 << FLAG_BITS))
    rows, heads, rows_too = lag.shape[0] > 1, lag.shape[1] > 1, flags.shape[0] > 1
    return (lag, flags), [
        pl.BlockSpec((1, 1, chunks, CHUNK), lambda b, h, t: (b * rows, h * heads, at(t), 0)),
        pl.BlockSpec((1, chunks, CHUNK), lambda b, h, t: (b * rows_too, at(t), 0)),
    ]


def _flags(chunk_marks: Marks) -> jax.Array:
    """One int32 [b,N,C] of a token's document and of what it does with the state."""
    document, state = chunk_marks.document_bNC, chunk_marks.state_bN1[..., None]
    before, after = state[:, :-1], state[:, 1:]
    flags = READS * (document == before) + WRITES * (document == after) + KEEPS * (before == after)
    return (document << FLAG_BITS) + flags


def _decay(decay: Decay, length: int, segment_ids):
    """The slopes where they are all that matters, else (lag, flags)."""
    if segment_ids is None and decay.log_decay_BTH is None:
        return jnp.asarray(decay.slopes_H, jnp.float32)
    chunk_marks = marks(decay, CHUNK, length, segment_ids)
    return chunk_marks.lag_bhNC, _flags(chunk_marks)


def _head_major(x_BTHD: jax.Array) -> jax.Array:
    return x_BTHD.swapaxes(1, 2)


def _forward(blocks: Blocks, options: Options, q, k, v, decay: Decay, state, segment_ids):
    decays = _decay(decay, q.shape[1], segment_ids)
    inputs = [_head_major(x) for x in (q, k, v)]
    o, state = _sweep(OUTPUT, options, blocks, decays, inputs, state, [(v.shape[-1], v.dtype)])
    return _head_major(o), state, None


def _backward(blocks: Blocks, options: Options, q, k, v, decay: Decay, state, segment_ids, saved, do, dstate):
    del saved
    q_dtype, k_dtype = (jnp.float32, jnp.float32) if options.wide else (q.dtype, k.dtype)
    decays = _decay(decay, q.shape[1], segment_ids)
    do = do.astype(v.dtype)
    dstate = dstate.astype(jnp.float32)
    q, k, v, do = (_head_major(x) for x in (q, k, v, do))
    (dq,) = _sweep(DQ, options, blocks, decays, [k, v, do], state, [(q.shape[-1], q_dtype)])
    outs = [(k.shape[-1], k_dtype), (v.shape[-1], v.dtype)]
    dk, dv, dstate = _sweep(DKV, options, blocks, decays, [q, k, v, do], dstate, outs)
    return _head_major(dq), _head_major(dk), _head_major(dv), dstate


def passes(blocks: Blocks) -> Passes:
    """The kernels, with rows cut so."""
    return Passes(partial(_forward, blocks), partial(_backward, blocks))


def _refuses(*, q_BTHK, k_BTHK, v_BTHV, **call) -> str | None:
    del call
    if compat.platform() != "tpu":
        return f"it runs on TPU and this is {compat.platform()}"
    for name, x in (("q", q_BTHK), ("k", k_BTHK), ("v", v_BTHV)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}, and it accumulates in float32 from float32 or bfloat16 only"
        if x.shape[-1] > WIDEST:
            return f"{name} has heads of width {x.shape[-1]}, and its state fits in VMEM up to {WIDEST}"
    return compat.undivided()


BACKEND = Backend("tpu", backend_function(passes(Blocks())), _refuses)
