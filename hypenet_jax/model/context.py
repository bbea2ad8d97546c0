"""What every mixer is told about the tokens beside their activations."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from hypenet_jax.parallel.sharded_kernels import along_rows


class Context(NamedTuple):
    """Positions and documents of a batch.

    positions_BT: int32 [B or 1, T], counted from the start of each document (or of the cached sequence).
    segment_ids_BT: int32 [B, T] or None (one document a row); negative ids are padding.
    query_scale_BT: float32, in the shape of the positions: HyPE's s_t for attention queries, or None.
    exchange: None: tokens lie in natural order. Else they lie in zigzag order over the mesh axis seq, and attention
      gets at the other devices' keys by this exchange (`parallel.sequence.attention`).
    """

    positions_BT: jax.Array
    segment_ids_BT: jax.Array | None
    query_scale_BT: jax.Array | None = None
    exchange: str | None = None


def training_context(tokens_BT: jax.Array, segment_ids_BT: jax.Array | None) -> Context:
    """Positions restart at every document, so that packed documents see what they would see alone."""
    steps = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
    if segment_ids_BT is None:
        return Context(steps, None)
    return Context(*along_rows(_positions_and_documents, segment_ids_BT))


def _positions_and_documents(segment_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    steps, valid = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)[None], segment_ids_BT >= 0
    # Padding may stand between or inside documents: compare with the last real token, and do not count padding.
    last_real = jax.lax.cummax(jnp.where(valid, steps, -1), axis=1)
    before = jnp.pad(last_real[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous_id = jnp.take_along_axis(segment_ids_BT, jnp.maximum(before, 0), axis=1)
    starts = valid & ((before < 0) | (segment_ids_BT != previous_id))
    count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    start_count = jax.lax.cummax(jnp.where(starts, count, 0), axis=1)
    document = jnp.where(valid, jnp.cumsum(starts, axis=1, dtype=jnp.int32) - 1, -1)
    return jnp.where(valid, count - start_count, 0), document
