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

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 128


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
    ids = in_chunks(jnp.zeros((1, length), jnp.int32) if segment_ids is None else segment_ids, chunk, -1)
    real = ids >= 0
    document, _ = _documents(ids)
    state = jnp.pad(document[..., -1], ((0, 0), (1, 0)))
    causal = jnp.tri(chunk, dtype=bool)
    if decay.log_decay_BTH is None:
        count_bNC = jnp.sum(causal & real[..., None, :], axis=-1, dtype=jnp.int32)
        lag = jnp.asarray(decay.slopes_H, jnp.float32)[:, None, None] * count_bNC[:, None]
    else:
        rate = in_chunks(-decay.log_decay_BTH.astype(jnp.float32).swapaxes(1, 2), chunk, 0)
        rate = jnp.where(real[:, None], rate, 0.0)
        lag = jnp.sum(jnp.where(causal, rate[..., None, :], 0.0), axis=-1)
    return Marks(lag, jnp.where(real, document, -1), state)


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
    ids = in_chunks(jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids, BLOCK, -1)
    document, begins = _documents(ids)
    flow = jnp.where((ids >= 0)[:, None], in_chunks(flow_BTH.swapaxes(1, 2), BLOCK, 0), 0.0)
    flow = flow.at[:, :, -1, -1].add(end_BH)
    summed = _sums_to_the_end(flow, document)
    # The state resets at the first token of a later document, whose decay has nothing to act on.
    summed = jnp.where(((ids >= 0) & ~begins)[:, None], summed, 0.0)
    return summed.reshape(*summed.shape[:2], -1)[..., :length].swapaxes(1, 2)


# XLA's cumulative operations and gathers over 131,072 tokens take the TPU compiler most of a minute. These reduce
# blocks under a triangular mask, and go over what the blocks come to likewise.


def _documents(ids_BNC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The number of documents begun before or at each token, less the first; and whether one begins there.

    A document begins where the id differs from the last real token's, however many padding tokens lie between; padding
    belongs with the tokens before it.
    """
    last = _last_real_before(ids_BNC)
    begins = (ids_BNC >= 0) & (last >= 0) & (ids_BNC != last)
    return sum_before(begins.astype(jnp.int32)) + begins, begins


def _last_real_before(ids: jax.Array) -> jax.Array:
    """The last id that is not negative before each place of [.., N, C] in reading order; -1 before the first."""
    places = jnp.arange(ids.shape[-1])

    def last(seen):
        place = jnp.max(jnp.where(seen & (ids[..., None, :] >= 0), places, -1), axis=-1)
        at = jnp.sum(jnp.where(places == place[..., None], ids[..., None, :], 0), axis=-1)
        return jnp.where(place >= 0, at, -1)

    within = last(places < places[:, None])
    if ids.shape[-2] == 1:
        return within
    before = _last_real_before(in_chunks(last(True)[..., 0], BLOCK, -1))
    return jnp.where(within >= 0, within, _flat(before, ids.shape[-2])[..., None])


def sum_before(x: jax.Array) -> jax.Array:
    """The sum over the places of [.., N, C] before each, in reading order."""
    within = jnp.sum(jnp.where(jnp.tri(x.shape[-1], k=-1, dtype=bool), x[..., None, :], 0), axis=-1, dtype=x.dtype)
    if x.shape[-2] == 1:
        return within
    before = sum_before(in_chunks(jnp.sum(x, axis=-1, dtype=x.dtype), BLOCK, 0))
    return within + _flat(before, x.shape[-2])[..., None]


def _sums_to_the_end(x_BHNC: jax.Array, document_BNC: jax.Array) -> jax.Array:
    """The sum over each token's document from the token on."""
    first, last = document_BNC[..., :1], document_BNC[..., -1:]
    one_document = document_BNC[..., :, None] == document_BNC[..., None, :]
    later = one_document & jnp.tri(document_BNC.shape[-1], dtype=bool).T
    within = jnp.sum(jnp.where(later[:, None], x_BHNC[..., None, :], 0.0), axis=-1)
    # The documents of later chunks are counted up, so that a chunk's last one reaches as far as chunks begin with it.
    opening_BHN = jnp.sum(jnp.where((document_BNC == first)[:, None], x_BHNC, 0.0), axis=-1)
    reached = (last == first.swapaxes(1, 2)) & jnp.tri(first.shape[1], k=-1, dtype=bool).T
    beyond_BHN = jnp.sum(jnp.where(reached[:, None], opening_BHN[:, :, None], 0.0), axis=-1)
    return within + jnp.where((document_BNC == last)[:, None], beyond_BHN[..., None], 0.0)


def in_chunks(x: jax.Array, chunk: int, fill: float) -> jax.Array:
    """[.., T] -> [.., N, chunk], the tail filled up."""
    widths = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % chunk)]
    return jnp.pad(x, widths, constant_values=fill).reshape(*x.shape[:-1], -1, chunk)


def _flat(x: jax.Array, length: int) -> jax.Array:
    """[.., N, C] -> [.., length], the tail dropped."""
    return x.reshape(*x.shape[:-2], -1)[..., :length]
