"""The losses with every logit in memory: obviously right."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import Backend


def linear_kl(
    hidden_student: jax.Array,
    weight_student: jax.Array,
    hidden_teacher: jax.Array,
    weight_teacher: jax.Array,
    mask: jax.Array,
    *,
    token_chunk: int | None,
    temperature: float,
) -> tuple[jax.Array, jax.Array]:
    """See `api.linear_kl`. Float32 throughout (float64 for float64 inputs), all tokens at once."""
    del token_chunk
    log_student = jax.nn.log_softmax(_logits(hidden_student, weight_student) / temperature)
    log_teacher = jax.lax.stop_gradient(jax.nn.log_softmax(_logits(hidden_teacher, weight_teacher) / temperature))
    return _mean(jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1), mask)


def linear_cross_entropy(
    hidden: jax.Array, weight: jax.Array, labels: jax.Array, mask: jax.Array, *, token_chunk: int | None
) -> tuple[jax.Array, jax.Array]:
    """See `api.linear_cross_entropy`."""
    del token_chunk
    log_p = jax.nn.log_softmax(_logits(hidden, weight))
    picked = jnp.take_along_axis(log_p, jnp.where(mask, labels, 0)[..., None], axis=-1)[..., 0]
    return _mean(-picked, mask)


def _logits(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    # The weight meets the hidden states in their dtype, as it does in the model.
    weight = weight.astype(hidden.dtype).astype(dtype)
    return jnp.matmul(hidden.astype(dtype), weight, precision=jax.lax.Precision.HIGHEST)


def _mean(loss: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    count = jnp.sum(mask, dtype=jnp.float32)
    return jnp.sum(jnp.where(mask, loss, 0.0)) / jnp.maximum(count, 1.0), count


KL_BACKEND = Backend("reference", linear_kl, lambda **call: None)
BACKEND = Backend("reference", linear_cross_entropy, lambda **call: None)
