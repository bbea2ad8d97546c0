"""Lightning over a sequence in zigzag order: each shard makes its two half-blocks from the states that enter them.

Per layer and shard, with S the bytes of one float32 state [b, H, K, V] and n shards: the states that the two
half-blocks leave behind, from zero, go to the shards by slices of K*V (all-to-all, 2S(n-1)/n sent); each shard puts
together, for its slice, what enters every half-block; that goes back the same way (again 2S(n-1)/n). Beside it 16 bytes
a row and half-block are gathered. Gathering all states would move 2S(n-1), and hold 2nS.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from hypenet_jax.parallel.sequence.order import by_shard, in_natural_order
from kernels_pallas import lightning as kernel


class Summary(NamedTuple):
    """What the state must know of half-blocks; each [..., b].

    The ids of the first and last real token (-1 where there is none), whether all real tokens have one id, and how many
    there are.
    """

    first: jax.Array
    last: jax.Array
    one: jax.Array
    tokens: jax.Array


def lightning_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    slopes_H: ArrayLike,
    *,
    axis_name: str,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.lightning.lightning_attention` of the whole sequence, in zigzag order over mesh axis `axis_name`.

    Args:
      q_BTHK, k_BTHK, v_BTHV, segment_ids: this shard's T/n tokens, an even number.
      slopes_H, scale: as in the kernel.
      initial_state: float32 [B,H,K,V] that enters the first half-block, alike on all shards.

    Returns:
      o_BTHV of this shard's tokens; and the float32 state after the whole sequence, alike on all shards.
    """
    batch = q_BTHK.shape[0]
    q, k, v = (_halves_as_rows(x) for x in (q_BTHK, k_BTHK, v_BTHV))
    ids = None if segment_ids is None else _halves_as_rows(segment_ids)
    left = kernel.lightning_state(k, v, slopes_H, segment_ids=ids)
    summary = _constant(q.shape[1], axis_name) if ids is None else _gathered(ids, batch, axis_name)
    weights_SMbH = _weights(summary, jnp.asarray(slopes_H, jnp.float32))
    entering, final = _exchange(left, weights_SMbH, initial_state, batch, axis_name)
    o, _ = kernel.lightning_attention(q, k, v, slopes_H, scale=scale, initial_state=entering, segment_ids=ids)
    return o.reshape(v_BTHV.shape), final


def _halves_as_rows(x_BT: jax.Array) -> jax.Array:
    return x_BT.reshape(2 * x_BT.shape[0], x_BT.shape[1] // 2, *x_BT.shape[2:])


def _gathered(ids_RC: jax.Array, batch: int, axis_name: str) -> Summary:
    """Of all half-blocks in natural order, each [2n, b], from this shard's ids [2b, C]."""
    real, places = ids_RC >= 0, jnp.arange(ids_RC.shape[1])
    count = jnp.sum(real, axis=1, dtype=jnp.int32)

    def id_at(place_R):
        there = jnp.sum(jnp.where(places == place_R[:, None], ids_RC, 0), axis=1)
        return jnp.where(count > 0, there, -1)

    first = id_at(jnp.min(jnp.where(real, places, ids_RC.shape[1]), axis=1))
    last = id_at(jnp.max(jnp.where(real, places, -1), axis=1))
    one = jnp.all(~real | (ids_RC == first[:, None]), axis=1)
    own = jnp.stack([first, last, one.astype(jnp.int32), count], axis=-1).reshape(batch, 2, 4)
    blocks_Mb4 = in_natural_order(jax.lax.all_gather(own, axis_name))
    first, last, one, count = jnp.moveaxis(blocks_Mb4, -1, 0)
    return Summary(first, last, one > 0, count)


def _constant(half: int, axis_name: str) -> Summary:
    """The same of rows of one document, [2n, 1]."""
    zeros = jnp.zeros((2 * jax.lax.axis_size(axis_name), 1), jnp.int32)
    return Summary(zeros, zeros, zeros == 0, zeros + half)


def _weights(blocks: Summary, slopes_H: jax.Array) -> jax.Array:
    """How much of each source is in what enters each target, float32 [2n+1, 2n+1, b, H].

    Sources: the initial state, then what each half-block leaves behind. Targets: the half-blocks, then the end.
    """
    index = jnp.arange(blocks.tokens.shape[0])
    empty = blocks.tokens == 0
    before = jnp.where((index[:, None] > index)[..., None] & ~empty, index[:, None], -1)
    before_Mb = jnp.max(before, axis=1)  # the nearest half-block before with a real token, -1 for none
    previous_Mb = jnp.take_along_axis(blocks.last, jnp.maximum(before_Mb, 0), axis=0)
    # The state that comes is of this half-block's first document; padding lets everything through.
    joins_Mb = empty | (before_Mb < 0) | (blocks.first == previous_Mb)
    breaks_Sb = jnp.pad(jnp.cumsum(~(joins_Mb & blocks.one), axis=0, dtype=jnp.int32), ((1, 0), (0, 0)))
    tokens_Sb = jnp.pad(jnp.cumsum(blocks.tokens, axis=0), ((1, 0), (0, 0)))
    place = jnp.arange(tokens_Sb.shape[0])
    kept = (place[:, None] <= place)[..., None] & (breaks_Sb[:, None] == breaks_Sb)
    kept &= jnp.pad(joins_Mb, ((0, 1), (0, 0)), constant_values=True)
    lag = slopes_H * jnp.maximum(tokens_Sb - tokens_Sb[:, None], 0)[..., None]
    return jax.lax.stop_gradient(jnp.where(kept[..., None], jnp.exp(-lag), 0.0))


def _exchange(
    left_RHKV: jax.Array, weights_SMbH: jax.Array, initial_state: jax.Array | None, batch: int, axis_name: str
) -> tuple[jax.Array, jax.Array]:
    """What enters this shard's half-blocks [2b,H,K,V], and the state after the last one of all [b,H,K,V]."""
    shards, heads = jax.lax.axis_size(axis_name), left_RHKV.shape[1]
    slices = _sliced(left_RHKV, shards).reshape(shards, batch, 2, heads, -1)
    sources = in_natural_order(jax.lax.all_to_all(slices, axis_name, 0, 0))  # [2n, b, H, X]
    if initial_state is None:
        weights_SMbH = weights_SMbH[1:]
    else:
        mine = jax.lax.axis_index(axis_name)
        own = jax.lax.dynamic_index_in_dim(_sliced(initial_state.astype(jnp.float32), shards), mine, 0, False)
        sources = jnp.concatenate([own[None], sources])
    weights_SMbH = jnp.broadcast_to(weights_SMbH, (*weights_SMbH.shape[:2], batch, heads))
    exact = jax.lax.Precision.HIGHEST
    entering = jnp.einsum("smbh,sbhx->mbhx", weights_SMbH, sources, precision=exact)
    back = jax.lax.all_to_all(by_shard(entering[:-1]), axis_name, 0, 0)  # [n, b, 2, H, X]
    final = _from_all_shards(entering[-1], axis_name)
    return _whole(back.reshape(shards, 2 * batch, heads, -1), left_RHKV), _whole(final, left_RHKV)


def _sliced(state_RHKV: jax.Array, shards: int) -> jax.Array:
    """[R, H, K, V] -> [n, R, H, X], filled up with zeros where n does not divide K*V."""
    flat = state_RHKV.reshape(*state_RHKV.shape[:2], -1)
    flat = jnp.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[2] % shards)))
    return jnp.moveaxis(flat.reshape(*flat.shape[:2], shards, -1), 2, 0)


def _whole(slices_nRHX: jax.Array, like_RHKV: jax.Array) -> jax.Array:
    _, heads, keys, values = like_RHKV.shape
    flat = jnp.moveaxis(slices_nRHX, 0, 2).reshape(-1, heads, slices_nRHX.shape[0] * slices_nRHX.shape[3])
    return flat[..., : keys * values].reshape(-1, heads, keys, values)


def _from_all_shards(slice_bHX: jax.Array, axis_name: str) -> jax.Array:
    """[n, b, H, X] of all shards' slices. A sum, because its result is typed as alike on all shards."""
    shards, mine = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    there = (jnp.arange(shards) == mine)[:, None, None, None]
    return jax.lax.psum(jnp.where(there, slice_bHX, 0.0), axis_name)
