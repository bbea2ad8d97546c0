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
    """What is known of each token, [B,1,T] with the tokens along the lanes.

    The last key that a query sees and its id, int32; the factor of its scores, float32; and the ids of the keys, int32.
    """

    last_B1T: jax.Array
    ids_B1T: jax.Array
    factor_B1T: jax.Array
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
    factor_BT = padded(factor_BT.astype(jnp.float32), 1, blocks.queries)
    key_ids_BS = padded(key_ids_BS.astype(jnp.int32), 1, blocks.keys, FOREIGN)
    described = Rows(*(x[:, None] for x in (last_BT, ids_BT, factor_BT, key_ids_BS)))
    # XLA would look for seconds for the best way to compute these again in everything that reads them.
    return jax.lax.optimization_barrier(described)


def tables(rows: Rows, blocks: Blocks) -> Tables:
    """A pair is visited unless all of the key block lies beyond what the query block may see, or no id is in both.

    Exact where ids grow along the sequence; ids in any order only make the spans longer than they need be.
    """
    # Row by row: XLA takes many seconds to compile the same for all rows at once.
    by_row = jax.lax.map(
        lambda row: _tables_of_row(row[0], row[1], row[2], blocks),
        (rows.last_B1T[:, 0], rows.ids_B1T[:, 0], rows.key_ids_B1S[:, 0]),
    )
    return Tables(*(x.reshape(-1) for x in by_row))


def _tables_of_row(last_T: jax.Array, ids_T: jax.Array, key_ids_S: jax.Array, blocks: Blocks) -> Tables:
    last_XL, ids_XL = (_by_lane(x, blocks.queries) for x in (last_T, ids_T))
    key_ids_XL = _by_lane(key_ids_S, blocks.keys)
    smallest_N, largest_N = _extremes(ids_XL, last_XL >= 0, blocks.queries)
    smallest_M, largest_M = _extremes(key_ids_XL, key_ids_XL >= 0, blocks.keys)
    reach_N = _largest(last_XL, blocks.queries)
    start_M = jnp.arange(smallest_M.shape[0], dtype=jnp.int32) * blocks.keys
    meets_NM = (smallest_M <= largest_N[:, None]) & (largest_M >= smallest_N[:, None]) & (start_M <= reach_N[:, None])
    key_first, key_end = _span(meets_NM, 0)
    place_N = jnp.arange(reach_N.shape[0], dtype=jnp.int32)[:, None]
    visited_NM = (key_first <= place_N) & (place_N < key_end)
    has_padding_M = _largest(~key_ids_XL, blocks.keys) >= 0
    return Tables(
        *_span(meets_NM, 1),
        jnp.where(smallest_N == largest_N, smallest_N, -1),
        ~_largest(~last_XL, blocks.queries),
        key_first,
        key_end,
        jnp.where((smallest_M == largest_M) & ~has_padding_M, smallest_M, -2),
        *_span(visited_NM, 1),
    )


def _by_lane(x_T: jax.Array, block: int) -> jax.Array:
    # As it is in memory; to split a long row in other ways takes XLA seconds to compile.
    return x_T.reshape(-1, min(LANES, block))


def _largest(x_XL: jax.Array, block: int) -> jax.Array:
    """Over the tokens of each block."""
    return jnp.max(jnp.max(x_XL, axis=1).reshape(-1, block // x_XL.shape[1]), axis=1)


def _extremes(ids_XL: jax.Array, counts_XL: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The smallest and largest id of each block, the wrong way round where none counts."""
    smallest = ~_largest(jnp.where(counts_XL, ~ids_XL, FOREIGN), block)
    return smallest, _largest(jnp.where(counts_XL, ids_XL, FOREIGN), block)


def _span(meets: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The first True along `axis` and the end of the last, 0 and 0 where there is none."""
    places = jax.lax.broadcasted_iota(jnp.int32, meets.shape, axis)
    end = jnp.max(jnp.where(meets, places + 1, 0), axis=axis)
    first = jnp.min(jnp.where(meets, places, meets.shape[axis]), axis=axis)
    return jnp.minimum(first, end), end
