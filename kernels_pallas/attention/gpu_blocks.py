"""What the GPU kernels of attention share: which pairs of blocks they visit, and how they load and multiply them.

What a query sees is told by `last`, the last key it may see (-1 for none), and by ids: it sees the keys up to `last`
that have its own id. So queries may lie anywhere among the keys, which a ring or a cache needs. Ids come in contiguous
runs; were they not, the masks would still be right, and only more blocks visited.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas import compat

NOTHING = -1e30  # below every score, and finite: a row that sees nothing must not make inf - inf
LOG2_E = 1.4426950408889634
HIGHEST_ID = 2**31 - 1


class Tiles(NamedTuple):
    """Sizes of a kernel: tokens of a block, warps of a program, stages of its pipeline of loads."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


class Spans(NamedTuple):
    """[b, blocks, 4] int32, b being 1 or the batch: a block meets those of the other side from the first number to the
    second, and the pairs from the third to the fourth (within) need no mask."""

    of_queries: jax.Array
    of_keys: jax.Array


def spans(last_bT: jax.Array, ids_BT: jax.Array | None, key_ids_BS: jax.Array | None, keys: int, tiles: Tiles) -> Spans:
    """Queries that see nothing do not count: what a kernel finds for them is thrown away."""
    last_bNR = _blocks(last_bT, tiles.queries)
    sees_bNR = last_bNR >= 0
    reach_bN = jnp.max(last_bNR, axis=2)
    all_reach_bN = jnp.min(jnp.where(sees_bNR, last_bNR, HIGHEST_ID), axis=2)
    start_M = jnp.arange(pl.cdiv(keys, tiles.keys), dtype=jnp.int32) * tiles.keys
    meets_bNM = start_M <= reach_bN[..., None]
    whole_bNM = meets_bNM & (start_M + (tiles.keys - 1) <= all_reach_bN[..., None])
    if ids_BT is not None and key_ids_BS is not None:
        ids_BNR, key_ids_BMJ = _blocks(ids_BT, tiles.queries), _blocks(key_ids_BS, tiles.keys)
        low_BN, high_BN = _extremes(ids_BNR, sees_bNR)
        key_low_BM, key_high_BM = _extremes(key_ids_BMJ, key_ids_BMJ >= 0)
        shared_BNM = (key_low_BM[:, None] <= high_BN[..., None]) & (key_high_BM[:, None] >= low_BN[..., None])
        one_BM = (key_low_BM == key_high_BM) & jnp.all(key_ids_BMJ >= 0, axis=2)
        meets_bNM = meets_bNM & shared_BNM
        whole_bNM = whole_bNM & shared_BNM & (low_BN == high_BN)[..., None] & one_BM[:, None]
    return Spans(*(jnp.stack([*_span(meets_bNM, i, False), *_span(whole_bNM, i, True)], axis=-1) for i in (2, 1)))


def span(spans_ref, row, block):
    """(first, count of pairs that need a mask, first whole, end of whole) of a block, as scalars."""
    at = jnp.minimum(row, spans_ref.shape[0] - 1), block
    first, end, whole, whole_end = (spans_ref[(*at, i)] for i in range(4))
    return first, end - first - (whole_end - whole), whole, whole_end


def masked_place(i, first, whole, whole_end):
    """The place of the i-th pair that needs a mask: they lie on both sides of the whole ones."""
    return first + i + jnp.where(first + i >= whole, whole_end - whole, 0)


def columns(width: int) -> int:
    """Columns of a tile that holds rows of `width` numbers: a power of two, and at least what tensor cores take."""
    return pl.next_power_of_2(max(16, width))


def leading(size: int, axis: int):
    """The first `size` places of an axis, for a masked load or store: there may be more of them than places."""
    return pl.ds(0 if size <= axis else jnp.int32(0), size)  # JAX 0.12 refuses what it sees to be out of bounds


def load_rows(ref, row, start, size: int, head, end=None):
    """[size, D] of a [B,S,K,D] array, D filled up to `columns`. Slots from `end` on (None: all are there) are zero."""
    at, there = _rows(ref, row, start, size, head, end)
    return ref[at] if there is None else pltriton.load(ref.at[at], mask=there, other=0.0)


def store_rows(ref, row, start, size: int, head, value, end=None):
    """The counterpart of `load_rows`; slots from `end` on are left alone."""
    at, there = _rows(ref, row, start, size, head, end)
    pltriton.store(ref.at[at], value.astype(ref.dtype), mask=there)


def store(ref, value, mask) -> None:
    pltriton.store(ref, value, mask=mask)


def load_tokens(ref, at: tuple, start, size: int, axis: int, other):
    """[size] numbers of the last axis of an array, `other` beyond its end."""
    place = (*at, pl.ds(start, size))
    if axis % size == 0:
        return ref[place]
    return pltriton.load(ref.at[place], mask=start + jnp.arange(size) < axis, other=other)


def product(dtype, interpret: bool):
    """`dot(a, b, i, j)`: contracts axis i of a with axis j of b, float32 sums; float32 operands lose almost nothing."""
    exact: jax.lax.PrecisionLike = None
    if dtype == jnp.float32:
        exact = jax.lax.Precision.HIGHEST if interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3

    def dot(a, b, i, j):
        dimensions = (((i,), (j,)), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)

    return dot


def exp2(x, factor, shift, interpret: bool):
    """`2 ** (x * factor + shift)` in two instructions.

    What XLA makes of `jnp.exp2` takes care of denormal results, which costs four more, and rounds between the others.
    """
    if interpret:
        return jnp.exp2(x * factor + shift)
    shape = jnp.broadcast_shapes(jnp.shape(x), jnp.shape(factor), jnp.shape(shift))
    (y,) = pltriton.elementwise_inline_asm(
        "{ .reg .f32 t; fma.rn.ftz.f32 t, $1, $2, $3; ex2.approx.ftz.f32 $0, t; }",
        args=[jnp.broadcast_to(a, shape) for a in (x, factor, shift)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return y


def refusal(q_BTHD, k_BSKD, v_BSKD) -> str | None:
    """Why the GPU kernels do not take these arrays here."""
    if compat.platform() != "gpu":
        return f"it runs on a GPU and this is {compat.platform()}"
    for name, x in (("q", q_BTHD), ("k", k_BSKD), ("v", v_BSKD)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}, and it takes float32 and bfloat16"
        if x.shape[3] > 256:
            return f"{name} is {x.shape[3]} wide, and it goes to 256"
    return compat.undivided()


def _rows(ref, row, start, size: int, head, end):
    width = ref.shape[3]
    there = None
    if end is not None:
        there = (start + jnp.arange(size) < end)[:, None]
    if columns(width) != width:
        inside = (jnp.arange(columns(width)) < width)[None, :]
        there = inside if there is None else there & inside
    if there is not None:
        there = jnp.broadcast_to(there, (size, columns(width)))
    return (row, pl.ds(start, size), head, leading(columns(width), width)), there


def _blocks(x_bT: jax.Array, size: int) -> jax.Array:
    x = jnp.pad(x_bT.astype(jnp.int32), ((0, 0), (0, -x_bT.shape[1] % size)), constant_values=-1)
    return x.reshape(x.shape[0], -1, size)


def _extremes(ids: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.min(jnp.where(counted, ids, HIGHEST_ID), axis=2), jnp.max(jnp.where(counted, ids, -1), axis=2)


def _span(meets: jax.Array, axis: int, gapless: bool) -> tuple[jax.Array, jax.Array]:
    """The first True along `axis` and the end of the last; equal where there is none or, if `gapless`, a gap."""
    places = jax.lax.broadcasted_iota(jnp.int32, meets.shape, axis)
    end = jnp.max(jnp.where(meets, places + 1, 0), axis=axis)
    first = jnp.minimum(jnp.min(jnp.where(meets, places, meets.shape[axis]), axis=axis), end)
    if gapless:
        end = jnp.where(end - first == jnp.sum(meets, axis=axis), end, first)
    return first, end
