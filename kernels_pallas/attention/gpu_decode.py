"""Attention of a few queries to a long cache on a GPU: its keys are split over the chip (Pallas, Triton lowering).

Each program takes one kv head and one share of the keys its row of the batch really has, and reads them once for all
the query heads and queries that look at them (Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
It leaves an unnormalised float32 output, its largest score and its sum of weights; a second kernel merges the shares.

The bytes of the cache are the floor: everything else is to stay out of their way. Programs that run side by side read
neighbouring heads of the same slots, so that DRAM pages are used whole.

Axes: R rows (query t, head g of the group: r = t * G + g, padded to a multiple of 16 for the tensor cores), J keys of
a block, N splits.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.typing import DTypeLike

from kernels_pallas import compat
from kernels_pallas.attention.gpu_blocks import LOG2_E, NOTHING, columns, exp2, leading, load_rows, product

MAX_ROWS = 64  # T * G beyond this would spill; so many queries are better off in the kernel for sequences


class Tiles(NamedTuple):
    """Sizes of the kernel. `splits` None: see `splits_for`."""

    keys: int
    num_warps: int
    num_stages: int
    splits: int | None = None


def cached_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_positions_BT: jax.Array,
    *,
    scale: float,
    logit_scale: jax.Array | None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.cached_attention`. `tiles` None chooses by shape and dtype; at most `MAX_ROWS` queries times heads."""
    options: dict[str, Any] = {"scale": scale, "logit_scale": logit_scale, "tiles": tiles, "interpret": interpret}
    return attend(q_BTHD, k_BSKD, v_BSKD, q_positions_BT, dtype=v_BSKD.dtype, **options)[0]


def attend(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    last_BT: jax.Array,
    *,
    scale: float,
    logit_scale: jax.Array | None,
    dtype: DTypeLike,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `block.attend_cache`."""
    if logit_scale is not None:
        logit_scale = jnp.broadcast_to(logit_scale.astype(jnp.float32), q_BTHD.shape[:2])
    tiles = tiles or tiles_for(q_BTHD, k_BSKD)
    splits = tiles.splits or splits_for(tiles, q_BTHD.shape[0], k_BSKD)
    return _cached(tiles, splits, scale, jnp.dtype(dtype), interpret, q_BTHD, k_BSKD, v_BSKD, last_BT, logit_scale)


def fits(q_BTHD: jax.Array, k_BSKD: jax.Array) -> bool:
    """Whether so few queries ask that this kernel serves them."""
    return q_BTHD.shape[1] * q_BTHD.shape[2] // k_BSKD.shape[2] <= MAX_ROWS


def tiles_for(q_BTHD: jax.Array, k_BSKD: jax.Array) -> Tiles:
    """Blocks of 16 KB at most of K and of V: with three stages, two of each in flight, they also fit an Ada card."""
    width = columns(k_BSKD.shape[3]) * k_BSKD.dtype.itemsize
    return Tiles(keys=max(16, min(128, 16384 // width)), num_warps=4, num_stages=3)


def splits_for(tiles: Tiles, batch: int, k_BSKD: jax.Array) -> int:
    """How many shares each (batch row, kv head) makes of its keys: the fewest whole waves of programs.

    As many programs run on a multiprocessor as their blocks fit 227 KB of shared memory (a Hopper's).
    """
    slots, heads, width = k_BSKD.shape[1:]
    used = 2 * (tiles.num_stages - 1) * tiles.keys * columns(width) * k_BSKD.dtype.itemsize + 8192
    programs = compat.multiprocessors() * min(4, max(1, 227 * 1024 // used))
    pairs, most = batch * heads, max(1, slots // (4 * tiles.keys))
    fills = {waves: waves * programs // pairs * pairs / (waves * programs) for waves in range(1, 9)}
    waves = next((waves for waves, filled in fills.items() if filled > 0.96), 8)
    return max(1, min(most, waves * programs // pairs))


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _cached(tiles: Tiles, splits: int, scale: float, dtype, interpret: bool, q, k, v, positions_BT, logit_scale_BT):
    (batch, length, heads), kv_heads, v_width = q.shape[:3], k.shape[2], v.shape[3]
    partials = [
        jax.ShapeDtypeStruct((batch, splits, length, heads, v_width), jnp.float32),
        jax.ShapeDtypeStruct((batch, splits, length, heads), jnp.float32),
        jax.ShapeDtypeStruct((batch, splits, length, heads), jnp.float32),
    ]
    factors = () if logit_scale_BT is None else (logit_scale_BT,)
    o, top, total = compat.triton_call(
        partial(_share_kernel, block_keys=tiles.keys, splits=splits, scale=scale, interpret=interpret),
        grid=(kv_heads, splits, batch),
        out_shape=partials,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
        name="cached_attention",
    )(q, k, v, positions_BT, *factors)
    return compat.triton_call(
        _merge_kernel,
        grid=(heads, length, batch),
        out_shape=[
            jax.ShapeDtypeStruct((batch, length, heads, v_width), dtype),
            jax.ShapeDtypeStruct((batch, length, heads), jnp.float32),
        ],
        num_warps=4,
        num_stages=1,
        interpret=interpret,
        name="cached_attention_merge",
    )(o, top, total)


def _share_kernel(
    q_ref, k_ref, v_ref, positions_ref, *refs, block_keys: int, splits: int, scale: float, interpret: bool
):
    *factor_refs, o_ref, top_ref, total_ref = refs
    (_, length, heads, width), (_, slots, kv_heads, v_width) = q_ref.shape, v_ref.shape
    head, split, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    group, dtype = heads // kv_heads, jnp.result_type(q_ref, k_ref, v_ref)
    dot = product(dtype, interpret)

    r = jnp.arange(pl.next_power_of_2(max(16, length * group)))
    real_R, t_R, h_R = r < length * group, r // group, head * group + r % group
    position_R = pltriton.load(positions_ref.at[jnp.full_like(r, row), t_R], mask=real_R, other=-1)
    factor_R = jnp.full(r.shape, scale * LOG2_E, jnp.float32)
    if factor_refs:
        factor_R *= pltriton.load(factor_refs[0].at[jnp.full_like(r, row), t_R], mask=real_R, other=1.0)
    at, real_RD = places(row, t_R, h_R, width, real_R)
    q_RD = pltriton.load(q_ref.at[at], mask=real_RD, other=0.0).astype(dtype)
    # Scores are scaled in float32, after their running maximum is taken: factors must not be negative.
    q_RD = jnp.where(factor_R < 0, -1.0, 1.0).astype(dtype)[:, None] * q_RD
    factor_R = jnp.abs(factor_R)

    seen = jnp.minimum(jnp.max(position_R) + 1, slots)
    blocks = pl.cdiv(seen, block_keys)

    def block(j, carry):
        top_R, total_R, o_RD = carry
        key_J = j * block_keys + jnp.arange(block_keys)
        k_JD, v_JD = (
            load_rows(ref, row, j * block_keys, block_keys, head, seen).astype(dtype) for ref in (k_ref, v_ref)
        )
        sees_RJ = key_J[None, :] <= position_R[:, None]
        scores_RJ = jnp.where(sees_RJ, dot(q_RD, k_JD, 1, 1), NOTHING)
        new_top_R = jnp.maximum(top_R, jnp.max(scores_RJ, axis=1))
        shrink_R = exp2(top_R - new_top_R, factor_R, 0.0, interpret)
        weights_RJ = exp2(scores_RJ, factor_R[:, None], -(new_top_R * factor_R)[:, None], interpret)
        weights_RJ = jnp.where(sees_RJ, weights_RJ, 0.0)
        total_R = total_R * shrink_R + jnp.sum(weights_RJ, axis=1)
        o_RD = o_RD * shrink_R[:, None] + dot(weights_RJ.astype(dtype), v_JD, 1, 0)
        return new_top_R, total_R, o_RD

    v_columns = columns(v_width)
    start = jnp.full(r.shape, NOTHING), jnp.zeros(r.shape), jnp.zeros((r.size, v_columns))
    first, last = split * blocks // splits, (split + 1) * blocks // splits
    top_R, total_R, o_RD = jax.lax.fori_loop(first, last, block, start)

    at = (jnp.full_like(r, row), jnp.full_like(r, split), t_R, h_R)
    pltriton.store(top_ref.at[at], jnp.where(total_R > 0, top_R * factor_R, NOTHING), mask=real_R)
    pltriton.store(total_ref.at[at], total_R, mask=real_R)
    at, real_RD = places((row, split), t_R, h_R, v_width, real_R)
    pltriton.store(o_ref.at[at], o_RD, mask=real_RD)


def _merge_kernel(o_ref, top_ref, total_ref, out_ref, log_sum_ref):
    h, t, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    splits, width = o_ref.shape[1], o_ref.shape[4]
    n = jnp.arange(pl.next_power_of_2(splits))
    d = jnp.arange(columns(width))
    at, real_N = (row, leading(n.size, splits), t, h), n < splits
    top_N = pltriton.load(top_ref.at[at], mask=real_N, other=NOTHING)
    total_N = pltriton.load(total_ref.at[at], mask=real_N, other=0.0)
    real_ND = real_N[:, None] & (d < width)[None, :]
    o_ND = pltriton.load(o_ref.at[(*at, leading(d.size, width))], mask=real_ND, other=0.0)
    top = jnp.max(top_N)
    share_N = jnp.exp2(top_N - top)
    total = jnp.sum(share_N * total_N)
    total = jnp.where(total > 0, total, 1.0)
    o_D = jnp.sum(share_N[:, None] * o_ND, axis=0) / total
    log_sum_ref[row, t, h] = top / LOG2_E + jnp.log(total)
    pltriton.store(out_ref.at[row, t, h, leading(d.size, width)], o_D.astype(out_ref.dtype), mask=d < width)


def places(row, t_R, h_R, width: int, real_R):
    """Indices [R,D] of rows (t, h) of a [..., T,H,D] array, and which of them are real; D padded to a power of two."""
    d = jnp.arange(columns(width))
    shape = (t_R.size, d.size)
    row = row if isinstance(row, tuple) else (row,)
    at = tuple(jnp.broadcast_to(x, shape) for x in (*row, t_R[:, None], h_R[:, None], d[None, :]))
    return at, jnp.broadcast_to(real_R[:, None] & (d < width)[None, :], shape)
