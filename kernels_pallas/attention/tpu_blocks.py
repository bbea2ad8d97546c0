"""Which pairs of blocks the TPU kernels of attention visit, and the forms that they read their inputs in.

What a query sees is told by three int32 rows: `last` (the last key it may see, -1 for none), its document's id, and
the ids of the keys. A query sees the keys up to `last` that have its id. All tables grow with the number of blocks, not
with the number of pairs: for each block a span of blocks, found from the smallest and largest id of each.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LANES = 128
NOTHING = -1e30  # below every score, and finite: a row that sees nothing must not make inf - inf
LOG2_E = 1.4426950408889634
FOREIGN = -(2**31)  # the id of keys that only fill up a block, and the one id that no query has
SMEM_BYTES = 2**19  # what the tables may take of a core's scalar memory (1 MiB on v5e, v5p and v6e)


class Blocks(NamedTuple):
    """Tokens a block: `queries` and `keys` divide the padded lengths; `part` of a block's keys are scored at a time."""

    queries: int
    keys: int
    part: int


class Rows(NamedTuple):
    """What is known of each token, with the tokens along the lanes.

    `tokens` are three int32 rows: the last key that a query sees, its id, and the bits of its float32 factor.
    """

    tokens_B3T: jax.Array
    key_ids_B1S: jax.Array


class Tables(NamedTuple):
    """Scalars of each block, [B * blocks] int32: a query block visits key blocks `first` to `end`, and so on.

    A pair needs no mask if the query block's `only` id is the key block's (-1 and -2 where a block holds several ids or
    padding) and the key block ends at or before `reach`. `visited` is the span of key blocks whose own span has the
    query block in it (spans may hold blocks that do not meet).
    """

    query_first: jax.Array
    query_end: jax.Array
    query_only: jax.Array
    query_reach: jax.Array
    key_first: jax.Array
    key_end: jax.Array
    key_only: jax.Array
    visited_first: jax.Array
    visited_end: jax.Array


def table_bytes(batch: int, query_blocks: int, key_blocks: int) -> int:
    """What the tables that a kernel reads take (the backward's are the larger)."""
    return 4 * batch * (4 * query_blocks + 3 * key_blocks)


def largest_block(length: int, limit: int) -> int:
    """The largest power of two times 128 up to `limit` that divides `length` rounded up to a multiple of 128."""
    rounded, block = -(-length // LANES) * LANES, LANES
    while block * 2 <= limit and rounded % (block * 2) == 0:
        block *= 2
    return block


def padded(x: jax.Array, axis: int, block: int, value: int = 0) -> jax.Array:
    """`x` filled up along `axis` to a multiple of `block`."""
    missing = -x.shape[axis] % block
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)], constant_values=value)


def rows(last_BT: jax.Array, ids_BT: jax.Array, factor_BT: jax.Array, key_ids_BS: jax.Array, blocks: Blocks) -> Rows:
    """Rows of whole blocks; what fills them up sees nothing and is not seen."""
    last_BT, ids_BT = (padded(x.astype(jnp.int32), 1, blocks.queries, -1) for x in (last_BT, ids_BT))
    factor_BT = jax.lax.bitcast_convert_type(padded(factor_BT.astype(jnp.float32), 1, blocks.queries), jnp.int32)
    key_ids_BS = padded(key_ids_BS.astype(jnp.int32), 1, blocks.keys, FOREIGN)
    return Rows(jnp.stack([last_BT, ids_BT, factor_BT], axis=1), key_ids_BS[:, None])


def tables(rows: Rows, blocks: Blocks) -> Tables:
    """A pair is visited unless all of the key block lies beyond what the query block may see, or no id is in both.

    Exact where ids grow along the sequence; ids in any order only make the spans longer than they need be.
    """
    # Row by row: XLA takes many seconds to compile the same for all rows at once.
    by_row = jax.lax.map(
        lambda row: _tables_of_row(*row, blocks), (rows.tokens_B3T[:, 0], rows.tokens_B3T[:, 1], rows.key_ids_B1S[:, 0])
    )
    return Tables(*(x.reshape(-1) for x in by_row))


def _tables_of_row(last_T: jax.Array, ids_T: jax.Array, key_ids_S: jax.Array, blocks: Blocks) -> Tables:
    smallest_N, largest_N = _extremes(ids_T, last_T >= 0, blocks.queries)
    smallest_M, largest_M = _extremes(key_ids_S, key_ids_S >= 0, blocks.keys)
    reach_N = _largest(last_T, blocks.queries)
    start_M = jnp.arange(smallest_M.shape[0], dtype=jnp.int32) * blocks.keys
    meets_NM = (smallest_M <= largest_N[:, None]) & (largest_M >= smallest_N[:, None]) & (start_M <= reach_N[:, None])
    key_first, key_end = _span(meets_NM, 0)
    place_N = jnp.arange(reach_N.shape[0], dtype=jnp.int32)[:, None]
    visited_NM = (key_first <= place_N) & (place_N < key_end)
    has_padding_M = _largest(~key_ids_S, blocks.keys) >= 0
    return Tables(
        *_span(meets_NM, 1),
        jnp.where(smallest_N == largest_N, smallest_N, -1),
        ~_largest(~last_T, blocks.queries),
        key_first,
        key_end,
        jnp.where((smallest_M == largest_M) & ~has_padding_M, smallest_M, -2),
        *_span(visited_NM, 1),
    )


def _largest(x_T: jax.Array, block: int) -> jax.Array:
    """[T] -> [N], over the tokens of each block."""
    # In two steps, the first along the lanes as they are: other ways to split a long row take XLA seconds to compile.
    within = min(LANES, block)
    return jnp.max(jnp.max(x_T.reshape(-1, within), axis=1).reshape(-1, block // within), axis=1)


def _extremes(ids_T: jax.Array, counts_T: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The smallest and largest id of each block, the wrong way round where none counts."""
    smallest = ~_largest(jnp.where(counts_T, ~ids_T, FOREIGN), block)
    return smallest, _largest(jnp.where(counts_T, ids_T, FOREIGN), block)


def _span(meets: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The first True along `axis` and the end of the last, 0 and 0 where there is none."""
    places = jax.lax.broadcasted_iota(jnp.int32, meets.shape, axis)
    end = jnp.max(jnp.where(meets, places + 1, 0), axis=axis)
    first = jnp.min(jnp.where(meets, places, meets.shape[axis]), axis=axis)
    return jnp.minimum(first, end), end
