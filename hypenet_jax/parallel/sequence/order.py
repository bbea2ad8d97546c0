"""Natural order and zigzag order of a sequence cut into 2n half-blocks, of which each of n shards holds two.

In natural order shard j holds half-blocks 2j and 2j+1, in zigzag order j and 2n-1-j. Even half-blocks and odd ones are
each a bijection onto the shards, in either order: two permutations bring one order into the other.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def to_zigzag(x_bT: jax.Array, axis_name: str) -> jax.Array:
    """[b, T/n, ...] of this shard, from natural to zigzag order; T/n is even."""
    even, odd = jnp.split(x_bT, 2, axis=1)
    even, odd = (jax.lax.ppermute(x, axis_name, _moves(axis_name, odds)) for odds, x in enumerate((even, odd)))
    return _in_turn(even, odd, axis_name)


def to_natural(x_bT: jax.Array, axis_name: str) -> jax.Array:
    """The inverse of `to_zigzag`."""
    first, second = jnp.split(x_bT, 2, axis=1)
    even, odd = jnp.split(_in_turn(first, second, axis_name), 2, axis=1)
    back = ([(there, here) for here, there in _moves(axis_name, odds)] for odds in (0, 1))
    return jnp.concatenate(
        [jax.lax.ppermute(x, axis_name, moves) for x, moves in zip((even, odd), back, strict=True)], 1
    )


def places(shard: jax.Array | int, shards: int, length: int) -> jax.Array:
    """The natural places, int32 [length], of the tokens that a shard holds in zigzag order."""
    half = jnp.arange(length // 2, dtype=jnp.int32)
    return jnp.concatenate([shard * (length // 2) + half, (2 * shards - 1 - shard) * (length // 2) + half])


def in_natural_order(blocks_nb2: jax.Array) -> jax.Array:
    """[n, b, 2, ...], both half-blocks of every shard -> [2n, b, ...], half-blocks in natural order."""
    return jnp.concatenate([blocks_nb2[:, :, 0], blocks_nb2[::-1, :, 1]])


def by_shard(blocks_Mb: jax.Array) -> jax.Array:
    """The inverse of `in_natural_order`."""
    first, second = jnp.split(blocks_Mb, 2)
    return jnp.stack([first, second[::-1]], axis=2)


def _moves(axis_name: str, odd: int) -> list[tuple[int, int]]:
    """(shard in natural order, shard in zigzag order) of the even or the odd half-blocks."""
    shards = jax.lax.axis_size(axis_name)
    blocks = ((shard, 2 * shard + odd) for shard in range(shards))
    return [(shard, min(block, 2 * shards - 1 - block)) for shard, block in blocks]


def _in_turn(first: jax.Array, second: jax.Array, axis_name: str) -> jax.Array:
    """Both halves, swapped on odd shards: of shard j's half-blocks j and 2n-1-j one is even."""
    swapped = jax.lax.axis_index(axis_name) % 2 == 1
    return jnp.concatenate([jnp.where(swapped, second, first), jnp.where(swapped, first, second)], axis=1)
