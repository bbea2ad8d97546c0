"""The loss of every single token, never building [B, T, V]."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypenet_jax.parallel.activations import mesh_of

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
    """`token_nll` from the hidden states after the final norm and the output matrix."""
    batch, length, _ = hidden_BTD.shape
    head = head_DV.astype(hidden_BTD.dtype)
    chunk = min(length, max(1, token_chunk // batch))
    chunks = -(-length // chunk)

    def split(x):
        padding = [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding).reshape(batch, chunks, chunk, *x.shape[2:]).swapaxes(0, 1)

    def one(inputs):
        hidden_BCD, targets_BC = inputs
        logits_BCV = jnp.einsum("bcd,dv->bcv", hidden_BCD, head, preferred_element_type=jnp.float32)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        nll_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - target_BC
        return nll_BC, jnp.argmax(logits_BCV, axis=-1) == targets_BC

    nll_NBC, ok_NBC = jax.lax.map(one, (split(hidden_BTD), split(targets_BT)))
    nll_BT, ok_BT = (x.swapaxes(0, 1).reshape(batch, chunks * chunk)[:, :length] for x in (nll_NBC, ok_NBC))
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
