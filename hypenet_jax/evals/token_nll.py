"""The loss of every single token, never building [B, T, V]."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypenet_jax.parallel.activations import mesh_of, sequence_shards

# (tokens_BT, targets_BT, segment_ids_BT) -> (nll_BT float32 in nats, argmax_ok_BT bool)
TokenNll = Callable[[Any, Any, Any], tuple[Any, Any]]


@functools.partial(jax.jit, static_argnames=("model", "token_chunk"))
def token_nll(
    model: Any,
    params: Any,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    token_chunk: int = 2048,
) -> tuple[jax.Array, jax.Array]:
    """(nll_BT float32 in nats, argmax_ok_BT bool) of the targets.

    Logits exist for about token_chunk tokens at a time (float32 [token_chunk, V]); the batch axis is kept, so a batch
    split over devices stays split. Padding (segment id below 0) has nll 0 and argmax_ok False.
    """
    hidden_BTD = model.hidden(params, tokens_BT, segment_ids_BT)
    return project_nll(hidden_BTD, model.head(params), targets_BT, segment_ids_BT, token_chunk)


def project_nll(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    token_chunk: int = 2048,
) -> tuple[jax.Array, jax.Array]:
    """`token_nll` from the hidden states after the final norm and the output matrix.

    Where devices split positions (P of them), each goes through its own in chunks.
    """
    batch, length, _ = hidden_BTD.shape
    head, parts = head_DV.astype(hidden_BTD.dtype), sequence_shards()
    part = -(-length // parts)
    chunk = min(part, max(1, token_chunk // batch))
    chunks = -(-part // chunk)

    def split(x):
        trailing = [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, [(0, 0), (0, parts * part - length), *trailing]).reshape(batch, parts, part, *x.shape[2:])
        x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * chunk - part), *trailing])
        return jnp.moveaxis(x.reshape(batch, parts, chunks, chunk, *x.shape[3:]), 2, 0)

    def joined(x_NBPC):
        return jnp.moveaxis(x_NBPC, 0, 2).reshape(batch, parts, -1)[:, :, :part].reshape(batch, -1)[:, :length]

    def one(inputs):
        hidden_BPCD, targets_BPC = inputs
        logits_BPCV = jnp.einsum("bpcd,dv->bpcv", hidden_BPCD, head, preferred_element_type=jnp.float32)
        target_BPC = jnp.take_along_axis(logits_BPCV, targets_BPC[..., None], axis=-1)[..., 0]
        nll_BPC = jax.nn.logsumexp(logits_BPCV, axis=-1) - target_BPC
        return nll_BPC, jnp.argmax(logits_BPCV, axis=-1) == targets_BPC

    nll_BT, ok_BT = (joined(x) for x in jax.lax.map(one, (split(hidden_BTD), split(targets_BT))))
    if segment_ids_BT is None:
        return nll_BT, ok_BT
    return jnp.where(segment_ids_BT >= 0, nll_BT, 0.0), ok_BT & (segment_ids_BT >= 0)


def bind(model_or_fn: Any, params: Any = None, token_chunk: int = 2048) -> TokenNll:
    """A TokenNll from a model and its parameters, or the given TokenNll itself when params is None.

    Probes call this, so that a caller may hand them one compiled function for many variants of a model.
    """
    if not hasattr(model_or_fn, "hidden"):
        return model_or_fn
    return functools.partial(_call, model_or_fn, params, token_chunk)


def _call(model, params, token_chunk, tokens_BT, targets_BT, segment_ids_BT):
    with mesh_of(params):
        return token_nll(model, params, tokens_BT, targets_BT, segment_ids_BT, token_chunk=token_chunk)


def padded_rows(array: np.ndarray, start: int, batch_size: int, fill: int = 0) -> np.ndarray:
    """Rows start..start+batch_size of an array, the missing ones filled: every batch has one shape."""
    rows = np.asarray(array[start : start + batch_size])
    if len(rows) == batch_size:
        return rows
    filler = np.full((batch_size - len(rows), *rows.shape[1:]), fill, rows.dtype)
    return np.concatenate([rows, filler])
