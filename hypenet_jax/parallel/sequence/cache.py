"""Keys and values of a cached sequence, dealt out to n shards like cards: position p is slot p div n of shard p mod n.

However long the sequence is, every shard then holds, and attends to, as much of it as any other.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.attention import attend_cache
from kernels_pallas.compat import vary, varying_axes


def stored(cache_BSKD: jax.Array, new_BTKD: jax.Array, positions_BT: jax.Array, *, axis_name: str) -> jax.Array:
    """This shard's slots with what of the new tokens is its own; all shards are given all tokens.

    positions_BT: int32, -1 for padding, which is not stored.
    """
    shards, rows = jax.lax.axis_size(axis_name), jnp.arange(cache_BSKD.shape[0])[:, None]
    own = (positions_BT >= 0) & (positions_BT % shards == jax.lax.axis_index(axis_name))
    # What is another shard's goes to a slot past the end, where mode="drop" discards it.
    slots = jnp.where(own, positions_BT // shards, cache_BSKD.shape[1])
    return cache_BSKD.at[rows, slots].set(new_BTKD.astype(cache_BSKD.dtype), mode="drop")


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_positions_BT: jax.Array,
    *,
    axis_name: str,
    scale: float | None = None,
    logit_scale_BT: jax.Array | None = None,
    split: bool = False,
) -> jax.Array:
    """`kernels_pallas.attention.cached_attention` to the slots of all shards.

    Every shard attends with all queries to its own slots; the parts are weighed by their log-sum-exps and added.

    Args:
      q_BTHD, q_positions_BT, logit_scale_BT: alike on all shards, or, if `split`, each shard's T/n of the queries.
      k_BSKD, v_BSKD: this shard's slots.

    Returns:
      o_BTHD of the queries given, in v's dtype.
    """
    if split:
        whole = partial(jax.lax.all_gather, axis_name=axis_name, axis=1, tiled=True)
        q_BTHD, q_positions_BT, logit_scale_BT = jax.tree.map(whole, (q_BTHD, q_positions_BT, logit_scale_BT))
    shards, scale = jax.lax.axis_size(axis_name), q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    # The last of this shard's slots that a query sees; -1 for none, and for padding.
    last_BT = (q_positions_BT - jax.lax.axis_index(axis_name)) // shards
    options = {"scale": scale, "logit_scale": logit_scale_BT, "dtype": jnp.float32}
    q_BTHD = vary(q_BTHD, varying_axes(k_BSKD))
    o, log_sum = attend_cache(q_BTHD, k_BSKD, v_BSKD, last_BT, **options)
    share = jnp.exp(log_sum - jax.lax.pmax(log_sum, axis_name))[..., None]
    total = jax.lax.psum(share, axis_name)
    parts = share * o / total
    if split:
        o = jax.lax.psum_scatter(parts, axis_name, scatter_dimension=1, tiled=True)
    else:
        o = jax.lax.psum(parts, axis_name)
    return o.astype(v_BSKD.dtype)
