"""Softmax attention with every score in memory: slow, and obviously right."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import Backend


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    causal: bool,
    segment_ids: jax.Array | None,
    scale: float,
    logit_scale: jax.Array | None,
) -> jax.Array:
    """See `api.attention`. Float32 throughout (float64 for float64 inputs)."""
    length, keys = q_BTHD.shape[1], k_BSKD.shape[1]
    seen_BTS = jnp.ones((1, length, keys), bool)
    if causal:
        seen_BTS &= jnp.arange(keys) <= jnp.arange(length)[:, None]
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        seen_BTS = seen_BTS & same & (segment_ids >= 0)[:, :, None]
    return _attend(q_BTHD, k_BSKD, v_BSKD, seen_BTS, scale, logit_scale)


def cached_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_positions_BT: jax.Array,
    *,
    scale: float,
    logit_scale: jax.Array | None,
) -> jax.Array:
    """See `api.cached_attention`."""
    seen_BTS = jnp.arange(k_BSKD.shape[1]) <= q_positions_BT[:, :, None]
    return _attend(q_BTHD, k_BSKD, v_BSKD, seen_BTS, scale, logit_scale)


def _attend(q, k, v, seen_BTS, scale, logit_scale):
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    group = q.shape[2] // k.shape[2]
    q, k_BSHD, v_BSHD = q.astype(dtype), jnp.repeat(k.astype(dtype), group, 2), jnp.repeat(v.astype(dtype), group, 2)
    if logit_scale is not None:
        q = q * jax.lax.stop_gradient(logit_scale.astype(dtype))[..., None, None]
    exact = jax.lax.Precision.HIGHEST
    scores_BHTS = scale * jnp.einsum("bthd,bshd->bhts", q, k_BSHD, precision=exact)
    # A finite filler keeps the gradient of a row that sees nothing from becoming NaN.
    scores_BHTS = jnp.where(seen_BTS[:, None], scores_BHTS, jnp.finfo(jnp.float32).min)
    probabilities = jnp.where(seen_BTS[:, None], jax.nn.softmax(scores_BHTS, axis=-1), 0.0)
    return jnp.einsum("bhts,bshd->bthd", probabilities, v_BSHD, precision=exact).astype(v.dtype)


BACKEND = Backend("reference", attention, lambda **call: None)
CACHED_BACKEND = Backend("reference", cached_attention, lambda **call: None)
