"""The kernels of the recurrence on a GPU (Pallas, Triton lowering). The formulas are in marks.py.

A row is cut into segments so that a few long rows fill the chip, and a segment into pieces. `local_states` runs the
state alone through every piece, from zero and over the chunks that the segment's end still knows of; `joined_states`
strings these together, which gives the state before each segment; `scan` then runs every segment from there and makes
the outputs. The gradients are the same scan with other operands:

    o  = scan(q, k, v)            dq = scan(do, v, k)                   from the first token to the last
    dv = reverse(k, q, do)        dk = reverse(v, do, q)                from the last token to the first

Reversed, the table D is transposed, and read and write change places: what a token took from the state going forward it
adds to the state's gradient going back.

The scan keeps the state transposed, [V,K]: then it is the left operand of its product, which a Hopper takes from
registers. Untransposed it goes through shared memory in every chunk, and the scan is 10% slower (docs/decisions/0016).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.compat import triton_call
from kernels_pallas.lightning.marks import Marks


class Tiles(NamedTuple):
    """How a kernel is cut: tokens a chunk, columns of v a program, warps a program, chunks in flight."""

    chunk: int
    columns: int
    warps: int
    stages: int


class Layout(NamedTuple):
    """What the kernels of one call share."""

    reverse: bool
    length: int  # tokens a row
    segments: int  # a row
    per_segment: int  # chunks a segment; the last may have fewer
    pieces: int  # a segment, and they divide its chunks
    exact: bool  # products in float32
    interpret: bool
    in_scale: float = 1.0  # factor of what the state takes in
    out_scale: float = 1.0  # factor of what is read from the state, and of the chunk's own scores
    scores_scale: float = 1.0

    @property
    def steps(self) -> int:
        """Pieces of a row before its last segment in the order of the scan, whose state nobody starts from."""
        return (self.segments - 1) * self.pieces


def scan(layout: Layout, tiles: Tiles, rates_H, marks: Marks | tuple[()], q, k, v, starts, out_dtype) -> Any:
    """Outputs [B,T,H,V] and the state after the row (before it, if reversed), float32 [B,H,K,V].

    `starts` float32 [B,N,H,K,V] holds the state that each of the N segments starts from.
    """
    batch, length, heads, _ = q.shape
    width = v.shape[-1]
    o = jax.ShapeDtypeStruct((batch, length, heads, width), out_dtype)
    state = jax.ShapeDtypeStruct((batch, heads, k.shape[-1], width), jnp.float32)
    return triton_call(
        partial(_scan, layout=layout, tiles=tiles),
        grid=(batch, layout.segments, heads * (width // tiles.columns)),
        out_shape=(o, state),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        interpret=layout.interpret,
        name="lightning_scan" + "_reversed" * layout.reverse,
    )(rates_H, marks, q, k, v, starts)


def _scan(rates_ref, marks_ref, q_ref, k_ref, v_ref, starts_ref, o_ref, end_ref, *, layout: Layout, tiles: Tiles):
    segment = pl.program_id(1)
    place = _place(layout, tiles, v_ref, segment, layout.per_segment)
    constant = None if marks_ref else _constant_tables(layout, tiles.chunk, rates_ref[place.head])
    dtype, dot = _arithmetic(layout, q_ref)

    def chunk(i, state_VK):
        c = place.chunk(i)
        intra, out, into, keep = constant or _tables(layout, tiles.chunk, marks_ref, place, c)
        load = partial(_load, layout, tiles, place, c, bool(marks_ref))
        q, k, v = load(q_ref).astype(dtype), load(k_ref).astype(dtype), load(v_ref, place.columns).astype(dtype)
        scores = (dot(k, q, 1, 1) * intra.T).astype(dtype)
        o_VC = dot(state_VK.astype(dtype), q, 1, 1) * out.T + dot(v, scores, 0, 0)
        _store(layout, tiles, place, c, bool(marks_ref), o_ref, o_VC.T)
        return keep * state_VK + dot((v * into).astype(dtype), k, 0, 0)

    state = starts_ref[place.row, segment, place.head, :, place.columns]
    state = jax.lax.fori_loop(0, place.chunks, chunk, state.T).T

    @pl.when(segment == (0 if layout.reverse else layout.segments - 1))
    def _():
        end_ref[place.row, place.head, :, place.columns] = state


def local_states(layout: Layout, tiles: Tiles, rates_H, skip_BPH, marks: Marks | tuple[()], k, v) -> jax.Array:
    """What each piece adds to the state after it, float32 [B,P,H,K,V], in the order of the scan.

    `skip_BPH` int32: the chunks that the piece leaves out, from its first. One that leaves out all writes nothing.
    """
    batch, _, heads, key_width = k.shape
    width = v.shape[-1]
    return triton_call(
        partial(_local_states, layout=layout, tiles=tiles),
        grid=(batch, layout.steps, heads * (width // tiles.columns)),
        out_shape=jax.ShapeDtypeStruct((batch, layout.steps, heads, key_width, width), jnp.float32),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        interpret=layout.interpret,
        name="lightning_states" + "_reversed" * layout.reverse,
    )(rates_H, skip_BPH, marks, k, v)


def _local_states(rates_ref, skip_ref, marks_ref, k_ref, v_ref, out_ref, *, layout: Layout, tiles: Tiles):
    step = pl.program_id(1)
    piece = layout.segments * layout.pieces - 1 - step if layout.reverse else step
    place = _place(layout, tiles, v_ref, piece, layout.per_segment // layout.pieces)
    constant = None if marks_ref else _constant_tables(layout, tiles.chunk, rates_ref[place.head], intra=False)
    dtype, dot = _arithmetic(layout, k_ref)

    def chunk(i, state):
        c = place.chunk(i)
        _, _, into, keep = constant or _tables(layout, tiles.chunk, marks_ref, place, c, intra=False)
        load = partial(_load, layout, tiles, place, c, bool(marks_ref))
        k, v = load(k_ref).astype(dtype), load(v_ref, place.columns).astype(dtype)
        return keep * state + dot((k * into).astype(dtype), v, 0, 0)

    skip = skip_ref[place.row, step, place.head]

    @pl.when(skip < place.chunks)
    def _():
        state = jnp.zeros((k_ref.shape[-1], tiles.columns), jnp.float32)
        state = jax.lax.fori_loop(skip, place.chunks, chunk, state)
        out_ref[place.row, step, place.head, :, place.columns] = state


def joined_states(layout: Layout, local, live_BPH, keep_BPH, start) -> jax.Array:
    """The state before each segment in the order of the scan, float32 [B,N,H,K,V].

    Over the pieces, `s_0 = start`, `s_p+1 = keep_p s_p + local_p`; of a piece that is not live, local_p is 0 unread.
    """
    batch, _, heads, *state = local.shape
    size = state[0] * state[1]
    block = min(size, 1024)
    joined = triton_call(
        partial(_joined_states, block=block, layout=layout),
        grid=(batch, heads, size // block),
        out_shape=jax.ShapeDtypeStruct((batch, layout.segments, heads, size), jnp.float32),
        num_warps=4,
        num_stages=2,
        interpret=layout.interpret,
        name="lightning_join",
    )(local.reshape(*local.shape[:3], size), live_BPH, keep_BPH, start.reshape(batch, heads, size))
    return joined.reshape(batch, layout.segments, heads, *state)


def _joined_states(local_ref, live_ref, keep_ref, start_ref, out_ref, *, block, layout: Layout):
    b, h, i = (pl.program_id(axis) for axis in range(3))
    at = pl.ds(i * block, block)
    state = start_ref[b, h, at]
    # Unrolled, so that no load waits for the state.
    for p in range(layout.steps):
        if p % layout.pieces == 0:
            out_ref[b, p // layout.pieces, h, at] = state
        live = jnp.full((block,), live_ref[b, p, h])
        state = keep_ref[b, p, h] * state + pltriton.load(local_ref.at[b, np.int32(p), h, at], mask=live, other=0.0)
    out_ref[b, layout.segments - 1, h, at] = state


class Place(NamedTuple):
    """Where a program stands: a run of chunks of one row, and one head's columns."""

    row: Any
    head: Any
    columns: Any  # the slice of v's columns
    chunks: Any  # how many it passes
    first: Any  # the first of them, in the order of the row
    reverse: bool

    def chunk(self, i):
        return self.first + (self.chunks - 1 - i if self.reverse else i)


def _place(layout: Layout, tiles: Tiles, v_ref, run, per_run: int) -> Place:
    """The place of the row's `run`-th run of `per_run` chunks, of which the last may have fewer or none."""
    blocks = v_ref.shape[-1] // tiles.columns
    last = pl.program_id(2)
    total = -(-layout.length // tiles.chunk)
    chunks: Any = per_run
    if total != layout.segments * layout.per_segment:
        chunks = jnp.clip(total - run * per_run, 0, per_run)
    columns = pl.ds((last % blocks) * tiles.columns, tiles.columns)
    return Place(pl.program_id(0), last // blocks, columns, chunks, run * per_run, layout.reverse)


class Tables(NamedTuple):
    """The decays of one chunk (marks.py), the scales in them."""

    intra: Any  # [C,C]
    out: Any  # [C,1]: of what is read from the state
    into: Any  # [C,1]: of what the state takes in
    keep: Any


def _constant_tables(layout: Layout, chunk: int, rate, intra: bool = True):
    """The tables of every chunk where no token differs from another."""
    i = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    j = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    lag = (j - i if layout.reverse else i - j).astype(jnp.float32)
    place = jax.lax.broadcasted_iota(jnp.int32, (chunk, 1), 0).astype(jnp.float32)
    read, write = jnp.exp(-rate * (place + 1.0)), jnp.exp(-rate * (chunk - 1.0 - place))
    out, into = (write, read) if layout.reverse else (read, write)
    table = jnp.where(lag >= 0, jnp.exp(-rate * jnp.maximum(lag, 0.0)), 0.0) * layout.scores_scale if intra else None
    return Tables(table, out * layout.out_scale, into * layout.in_scale, jnp.exp(-rate * chunk))


def _tables(layout: Layout, chunk: int, marks_ref: Marks, place: Place, c, intra: bool = True):
    """The tables of chunk c from its marks."""
    lag_ref, document_ref, state_ref = marks_ref
    row = place.row if document_ref.shape[0] > 1 else 0
    lag_row = place.row if lag_ref.shape[0] > 1 else 0
    lag, total = lag_ref[lag_row, place.head, c, :], lag_ref[lag_row, place.head, c, chunk - 1]
    document = document_ref[row, c, :]
    before, after = state_ref[row, c], state_ref[row, c + 1]
    read = jnp.where(document == before, jnp.exp(-lag), 0.0)[:, None]
    write = jnp.where(document == after, jnp.exp(lag - total), 0.0)[:, None]
    keep = jnp.where(before == after, jnp.exp(-total), 0.0)
    out, into = (write, read) if layout.reverse else (read, write)
    table = None
    if intra:
        i = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
        j = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
        sign = -1.0 if layout.reverse else 1.0
        seen = (j >= i if layout.reverse else i >= j) & (document[:, None] == document[None, :])
        gap = jnp.maximum(sign * (lag[:, None] - lag[None, :]), 0.0)
        table = jnp.where(seen & (document[:, None] >= 0), jnp.exp(-gap), 0.0) * layout.scores_scale
    return Tables(table, out * layout.out_scale, into * layout.in_scale, keep)


def _arithmetic(layout: Layout, ref):
    """The dtype of the products' operands, and the product of two tiles over the dimensions named."""
    dtype = jnp.float32 if layout.exact else ref.dtype
    precision: Any = None
    if dtype == jnp.float32:
        # Three products of TF32 halves: 1e-6, where one TF32 product would give 2e-4.
        precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        if layout.interpret:
            precision = jax.lax.Precision.HIGHEST

    def dot(a, b, a_axis, b_axis):
        dimensions = (((a_axis,), (b_axis,)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)

    return dtype, dot


def _load(layout: Layout, tiles: Tiles, place: Place, c, ragged: bool, ref, columns=slice(None)):
    at = ref.at[place.row, pl.ds(c * tiles.chunk, tiles.chunk), place.head, columns]
    mask = _within(layout, tiles, c, ragged)
    return pltriton.load(at, mask=mask, other=None if mask is None else 0.0)


def _store(layout: Layout, tiles: Tiles, place: Place, c, ragged: bool, ref, value):
    at = ref.at[place.row, pl.ds(c * tiles.chunk, tiles.chunk), place.head, place.columns]
    pltriton.store(at, value.astype(ref.dtype), mask=_within(layout, tiles, c, ragged))


def _within(layout: Layout, tiles: Tiles, c, ragged: bool):
    # A mask that depended on the marks, so that padding might hold anything, would break the pipelining of the loads:
    # the scan took 1.18 ms instead of 0.95 (docs/decisions/0016).
    return (c * tiles.chunk + jnp.arange(tiles.chunk) < layout.length)[:, None] if ragged else None
