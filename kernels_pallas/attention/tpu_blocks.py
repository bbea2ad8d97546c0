"""Which pairs of blocks the TPU kernels of attention visit, and the forms that they read their inputs in.

What a query sees is told by three int32 rows: `last` (the last key it may see, -1 for none), its document's id, and
the ids of the keys. A query sees the keys up to `last` that have its id. All tables grow with the number of blocks, not
with the number of pairs: for each block a span of blocks, found from the smallest and largest id of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import compat

LANES = 128
NOTHING = -1e30  # below every score, and finite: a row that sees nothing must not make inf - inf
LOG2_E = 1.4426950408889634
FOREIGN = -(2**31)  # the id of keys that only fill up a block, and the one id that no query has
LARGEST = 2**31 - 1
GRAINS, SPANS = 128, 256  # of which the tables are made at a time: fewer are less code, and more turns of a loop
SMEM_BYTES = 2**19  # what the tables may take of a core's scalar memory (1 MiB on v5e, v5p and v6e)


class Blocks(NamedTuple):
    """Tokens a block: `queries` and `keys` divide the padded lengths; `part` of a block's keys are scored at a time.

    A pair of blocks that needs a mask is gone through in tiles of a part and of the backward's `queries`, past those
    that do not meet; one that needs none in code without a loop (docs/decisions/0020).
    """

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
    """Scalars of each grain, int32: [B * query grains], a grain being the queries of the backward's blocks, and
    [B * key grains], a part of a block's keys.

    A query grain meets key grains `first` to `end`, a key grain query grains; where it meets none, `end` is 0 and
    `first` their number. A pair needs no mask if the query grain's `only` id is the key grain's (-1 and -2 where a
    grain holds several ids or padding) and the key grain ends at or before `reach`. `visited` is the span of the
    backward's key blocks whose own span has the query grain in it (spans may hold grains that do not meet).
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


def table_bytes(batch: int, query_grains: int, key_grains: int) -> int:
    """What the tables that a kernel reads take (the backward's are the larger)."""
    return 4 * batch * (4 * query_grains + 3 * key_grains)


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
    """Rows of whole blocks; what fills them up sees nothing and is not seen, nor do queries of negative ids see."""
    last_BT, ids_BT = (padded(x.astype(jnp.int32), 1, blocks.queries, -1) for x in (last_BT, ids_BT))
    factor_BT = padded(factor_BT.astype(jnp.float32), 1, blocks.queries)
    key_ids_BS = padded(key_ids_BS.astype(jnp.int32), 1, blocks.keys, FOREIGN)
    # In a long row XLA works on one sublane of eight, in code that grows with the row; so this is computed in rows of
    # lanes, which are the same memory. The barrier also keeps XLA from computing it again in everything that reads it.
    last, ids, factor = (x.reshape(len(x), -1, min(LANES, blocks.queries)) for x in (last_BT, ids_BT, factor_BT))
    key_ids = key_ids_BS.reshape(len(key_ids_BS), -1, min(LANES, blocks.part))
    described = jax.lax.optimization_barrier((jnp.where(ids >= 0, last, -1), ids, factor, key_ids))
    return Rows(*(x.reshape(len(x), 1, -1) for x in described))


def tables(rows: Rows, blocks: Blocks) -> Tables:
    """A pair is met unless all of the keys lie beyond what the queries may see, or no id is in both.

    Exact where ids grow along the sequence; ids in any order only make the spans longer than they need be. `blocks` are
    the backward's.
    """
    smallest_BN, largest_BN, reach_BN, sure_BN = _by_grain(_of_queries, rows[:2], blocks.queries)
    smallest_BM, largest_BM, least_BM = _by_grain(_of_keys, rows[3:], blocks.part)
    by_row = (smallest_BN, largest_BN, reach_BN, smallest_BM, largest_BM)
    # Row by row: XLA takes many seconds to compile the same for all rows at once.
    query_span, key_span, visited = jax.lax.map(lambda row: _spans(row[:3], row[3:], blocks), by_row)
    query_only = jnp.where(smallest_BN == largest_BN, smallest_BN, -1)
    key_only = jnp.where((smallest_BM == largest_BM) & (least_BM >= 0), smallest_BM, -2)
    found = (*query_span, query_only, sure_BN, *key_span, key_only, *visited)
    return Tables(*(x.reshape(-1) for x in found))


def _of_queries(last_XL: jax.Array, ids_XL: jax.Array) -> tuple[tuple[jax.Array, Callable], ...]:
    """The smallest and largest id of those that see something, the last key that any may see and that all may."""
    least_XL, most_XL = (jnp.where(last_XL >= 0, ids_XL, other) for other in (LARGEST, FOREIGN))
    return (least_XL, jnp.min), (most_XL, jnp.max), (last_XL, jnp.max), (last_XL, jnp.min)


def _of_keys(ids_XL: jax.Array) -> tuple[tuple[jax.Array, Callable], ...]:
    """The smallest and largest id, the wrong way round where all is padding, and whether anything is."""
    return (jnp.where(ids_XL >= 0, ids_XL, LARGEST), jnp.min), (ids_XL, jnp.max), (ids_XL, jnp.min)


def _by_grain(told: Callable, rows_B1T: Sequence[jax.Array], grain: int) -> list[jax.Array]:
    """What is `told` of each token, reduced over each grain: [B, grains]."""
    batch, lanes = rows_B1T[0].shape[0], min(LANES, grain)
    grains = rows_B1T[0].shape[2] // grain
    # A loop over some grains at a time: XLA unrolls a reduction of all of them, and compiles that for a second.
    chunk = min(GRAINS, grains)
    chunks = -(-grains // chunk)

    def reduced(rows_XL):
        by_row = [(reduce(x_XL, axis=1), reduce) for x_XL, reduce in told(*rows_XL)]
        return [reduce(x_X.reshape(chunk, -1), axis=1) for x_X, reduce in by_row]

    by_chunk = [
        padded(x.reshape(batch, -1, lanes), 1, chunk * grain // lanes).reshape(batch * chunks, -1, lanes)
        for x in rows_B1T
    ]
    return [x.reshape(batch, -1)[:, :grains] for x in jax.lax.map(reduced, by_chunk)]


def _spans(queries_N: Sequence[jax.Array], keys_M: Sequence[jax.Array], blocks: Blocks) -> tuple[tuple, tuple, tuple]:
    """For one row: the span of key grains of each query grain, of query grains of each key grain, and `visited`."""
    smallest_M, largest_M = keys_M
    start_M = jnp.arange(smallest_M.shape[0], dtype=jnp.int32) * blocks.part
    count, keys = queries_N[0].shape[0], smallest_M.shape[0]
    chunk = min(SPANS, count)
    # What fills the last chunk up meets nothing.
    fill = LARGEST, FOREIGN, -1
    by_chunk = [padded(x, 0, chunk, value).reshape(-1, chunk) for x, value in zip(queries_N, fill, strict=True)]
    place_CX = jnp.arange(by_chunk[0].size, dtype=jnp.int32).reshape(-1, chunk)

    def met(key_span, of_chunk):
        smallest_X, largest_X, reach_X, place_X = (x[:, None] for x in of_chunk)
        meets_XM = (smallest_M <= largest_X) & (largest_M >= smallest_X) & (start_M <= reach_X)
        first_M = jnp.min(jnp.where(meets_XM, place_X, count), axis=0)
        end_M = jnp.max(jnp.where(meets_XM, place_X + 1, 0), axis=0)
        return (jnp.minimum(key_span[0], first_M), jnp.maximum(key_span[1], end_M)), _span(meets_XM)

    axes = frozenset().union(*(compat.varying_axes(x) for x in (*queries_N, *keys_M)))
    none = tuple(compat.vary(jnp.full(keys, value, jnp.int32), axes) for value in (count, 0))
    key_span, query_span = jax.lax.scan(met, none, (*by_chunk, place_CX))
    first_J = jnp.min(key_span[0].reshape(-1, blocks.keys // blocks.part), axis=1)
    end_J = jnp.max(key_span[1].reshape(-1, blocks.keys // blocks.part), axis=1)
    visited = jax.lax.map(lambda place_X: _span((first_J <= place_X[:, None]) & (place_X[:, None] < end_J)), place_CX)
    return tuple(x.reshape(-1)[:count] for x in query_span), key_span, tuple(x.reshape(-1)[:count] for x in visited)


def _span(meets_XM: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first True of each row and the end of the last; the row's length and 0 where there is none."""
    places_XM = jax.lax.broadcasted_iota(jnp.int32, meets_XM.shape, 1)
    first_X = jnp.min(jnp.where(meets_XM, places_XM, meets_XM.shape[1]), axis=1)
    return first_X, jnp.max(jnp.where(meets_XM, places_XM + 1, 0), axis=1)
