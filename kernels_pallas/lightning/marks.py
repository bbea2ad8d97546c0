"""Who may see whom, and how much has decayed in between: what a chunked recurrence needs to know of each token.

With C tokens a chunk, lag_i the decay exponent summed from the chunk's start to token i inclusive, and S the state
before the chunk:

    D_ij    = exp(-(lag_i - lag_j))   where j <= i, in one document            (intra)
    read_i  = exp(-lag_i)             where i is of the document that S belongs to
    write_j = exp(-(lag_C - lag_j))   where j is of the document that the state after the chunk belongs to
    keep    = exp(-lag_C)             where the states before and after the chunk belong to one document
    o = scale ((q k^T * D) v + (read * q) S),    S' = keep S + (write * k)^T v

Every exponent is <= 0. The factored form k * exp(+s j) overflows float32 within a few hundred tokens. Padding belongs
to no document and adds nothing to the lag.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Decay(NamedTuple):
    """The decay of the state at each token; exactly one of the two.

    `slopes_H` float32, >= 0: token t decays head h by exp(-slopes_H[h]) (Lightning).
    `log_decay_BTH` float32, <= 0: token t decays head h by exp(log_decay_BTH[b, t, h]) (simple GLA, Mamba-2).
    """

    slopes_H: jax.Array | None
    log_decay_BTH: jax.Array | None


class Marks(NamedTuple):
    """The marks of N chunks of C tokens; an axis of size 1 (b for rows, h for heads) is shared by all."""

    lag_bhNC: jax.Array  # float32, >= 0, never falling along C
    document_bNC: jax.Array  # int32, counted from 0 within the row; -1 at padding
    state_bN1: jax.Array  # int32 [b, N + 1]: the document of the state before each chunk, and after the last


def marks(decay: Decay, chunk: int, length: int, segment_ids: jax.Array | None) -> Marks:
    """The marks of rows of `length` tokens, the tail filled up to whole chunks with padding."""
    if segment_ids is None:
        segment_ids = jnp.zeros((1, length), jnp.int32)
    ids = jnp.pad(segment_ids, ((0, 0), (0, -length % chunk)), constant_values=-1)
    real = ids >= 0
    document = _documents(ids, real)
    state = jnp.pad(document[:, chunk - 1 :: chunk], ((0, 0), (1, 0)))
    document = jnp.where(real, document, -1).reshape(ids.shape[0], -1, chunk)
    if decay.log_decay_BTH is None:
        count_bNC = _running(jnp.sum, 0, real.reshape(document.shape).astype(jnp.int32))
        lag = jnp.asarray(decay.slopes_H, jnp.float32)[:, None, None] * count_bNC[:, None]
    else:
        rate = jnp.pad(-decay.log_decay_BTH.astype(jnp.float32), ((0, 0), (0, -length % chunk), (0, 0)))
        rate = jnp.where(real[..., None], rate, 0.0).swapaxes(1, 2)
        lag = _running(jnp.sum, 0.0, rate.reshape(*rate.shape[:2], -1, chunk))
    return Marks(lag, document, state)


def log_decay_gradient(q, k, dq, dk, state, dstate, segment_ids) -> jax.Array:
    """The gradient in `log_decay_BTH`, float32, from the other gradients.

    With G the running sum of log decays of a document, o_i and the final state see exp(G_i - G_j) only: the gradient in
    G_t is q_t . dq_t - k_t . dk_t, plus <state, dstate> at the row's last token, and a log decay moves every G from its
    own token to the end of its document.
    """
    flow_BTH = jnp.sum(q.astype(jnp.float32) * dq.astype(jnp.float32), axis=-1)
    flow_BTH -= jnp.sum(k.astype(jnp.float32) * dk.astype(jnp.float32), axis=-1)
    end_BH = jnp.sum(state * dstate, axis=(-2, -1))
    batch, length = flow_BTH.shape[:2]
    ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    real = ids >= 0
    document = _documents(ids, real)
    last = jnp.arange(length) == length - 1
    flow_BTH = jnp.where(real[..., None], flow_BTH, 0.0) + jnp.where(last[:, None], end_BH[:, None], 0.0)
    begins = jnp.pad(document[:, 1:] != document[:, :-1], ((0, 0), (1, 0)))
    ends = jnp.pad(begins[:, 1:], ((0, 0), (0, 1)), constant_values=True)

    def add(later, earlier):
        return jnp.where(earlier[1], earlier[0], later[0] + earlier[0]), later[1] | earlier[1]

    marks_BTH = jnp.broadcast_to(ends[..., None], flow_BTH.shape)
    summed, _ = jax.lax.associative_scan(add, (flow_BTH, marks_BTH), reverse=True, axis=1)
    # The state resets at the first token of a later document, whose decay has nothing to act on.
    return jnp.where((real & ~begins)[..., None], summed, 0.0)


def _documents(ids_BT: jax.Array, real_BT: jax.Array) -> jax.Array:
    """The number of documents begun before or at each token, less the first: padding carries it on."""
    # A document begins where the id differs from the last real token's, however many padding tokens lie between.
    places = jnp.where(real_BT, jnp.arange(ids_BT.shape[1]), -1)
    last = jnp.pad(_running(jnp.max, -1, places)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    begins = real_BT & (last >= 0) & (ids_BT != jnp.take_along_axis(ids_BT, jnp.maximum(last, 0), axis=1))
    return _running(jnp.sum, 0, begins.astype(jnp.int32))


def _running(reduce: Callable[..., jax.Array], identity: float, x: jax.Array) -> jax.Array:
    """The inclusive running `reduce` (jnp.sum, jnp.max) along the last axis.

    By masked reductions of blocks of 128, then of the blocks' results: XLA's own cumulative operations over 131,072
    tokens take the TPU compiler most of a minute.
    """
    length = x.shape[-1]
    width = min(length, 128)
    fill = [(0, 0)] * (x.ndim - 1) + [(0, -length % width)]
    blocks = jnp.pad(x, fill, constant_values=identity).reshape(*x.shape[:-1], -1, width)
    blocks = reduce(jnp.where(jnp.tri(width, dtype=bool), blocks[..., None, :], identity), axis=-1)
    if blocks.shape[-2] > 1:
        ends = _running(reduce, identity, blocks[..., -1])[..., :-1]
        before = jnp.pad(ends, [(0, 0)] * (x.ndim - 1) + [(1, 0)], constant_values=identity)
        blocks = reduce(jnp.stack([blocks, jnp.broadcast_to(before[..., None], blocks.shape)]), axis=0)
    return blocks.reshape(*x.shape[:-1], -1)[..., :length]
