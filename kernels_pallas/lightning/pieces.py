"""What the pass that makes states can leave out: tokens that have decayed away, or whose document has ended.

A piece is a part of a segment of whole chunks. For each piece [b,H,P], in the order of the scan and without those of
the last segment, whose state nobody starts from: how many chunks at its beginning are left out, whether any remain,
and how much a state decays in it. An axis b of size 1 is shared by all rows.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.lightning.gpu_kernels import Layout
from kernels_pallas.lightning.marks import Marks


def of_rates(layout: Layout, chunk: int, rates_H: jax.Array, bits: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pieces of one document a row, in full chunks; left out is what has decayed by more than `bits`.

    In closed form, from a few numbers a piece: XLA would fold sums over all chunks at compile time, for seconds.
    """
    segment = np.arange(layout.segments)[:, None] * layout.per_segment
    piece = np.arange(layout.pieces) * (layout.per_segment // layout.pieces)  # from the segment's start
    chunks = layout.length // chunk
    in_segment = np.clip(chunks - segment, 0, layout.per_segment)
    in_piece = np.clip(in_segment - piece, 0, layout.per_segment // layout.pieces)
    # How many chunks may lie between a token and the segment's end.
    lag_H11 = rates_H.astype(jnp.float32)[:, None, None] * chunk
    reach = jnp.floor(bits * math.log(2.0) / lag_H11)
    left_out = piece + in_piece - 1 - reach if layout.reverse else in_segment - 1 - reach - piece
    skip = jnp.clip(left_out, 0, in_piece).astype(jnp.int32)[None]
    return _in_order(layout, skip, skip < in_piece, jnp.exp(-lag_H11 * in_piece)[None])


def of_marks(layout: Layout, marked: Marks, bits: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The pieces of rows whose tokens differ; left out is also what is of another document than the state."""
    chunks, shape = marked.lag_bhNC.shape[-2], (layout.segments, layout.per_segment)

    def fold(x, mode="edge"):
        """[..,N] -> [..,segments,per_segment]"""
        fill = [(0, 0)] * (x.ndim - 1) + [(0, math.prod(shape) - chunks)]
        return jnp.pad(x, fill, mode=mode).reshape(*x.shape[:-1], *shape)

    lag = fold(marked.lag_bhNC[..., -1], "constant")
    before, after = fold(marked.state_bN1[:, None, :-1]), fold(marked.state_bN1[:, None, 1:])
    gap = jnp.cumsum(lag if layout.reverse else lag[..., ::-1], axis=-1)
    gap = gap - lag if layout.reverse else gap[..., ::-1] - lag
    another = before != before[..., :1] if layout.reverse else after != after[..., -1:]
    real = jnp.arange(math.prod(shape)).reshape(shape) < chunks
    forgotten = real & ((gap > bits * math.log(2.0)) | another)

    pieces = (layout.segments, layout.pieces, layout.per_segment // layout.pieces)
    lag, before, after, forgotten = (x.reshape(*x.shape[:2], *pieces) for x in (lag, before, after, forgotten))
    skip = jnp.sum(forgotten, axis=-1, dtype=jnp.int32)
    live = skip < jnp.sum(real.reshape(pieces), axis=-1)
    keep = jnp.where(before[..., 0] == after[..., -1], jnp.exp(-jnp.sum(lag, axis=-1)), 0.0)
    return _in_order(layout, skip, live, keep)


def _in_order(layout: Layout, skip, live, keep) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From [b,H,segments,pieces] to the order of the scan."""
    order = slice(None, None, -1 if layout.reverse else 1)
    skip, live, keep = (x.reshape(*x.shape[:2], -1)[..., order][..., : layout.steps] for x in (skip, live, keep))
    return skip, live, keep
