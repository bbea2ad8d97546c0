"""The losses with every logit in memory: obviously right."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels_pallas.cross_entropy.sweep import Tokens
from kernels_pallas.cross_entropy.terms import Options, TopK
from kernels_pallas.dispatch import Backend


def linear_loss(weight, weight_teacher, tokens: Tokens, *, options: Options) -> jax.Array:
    """Sum over tokens of their shares of KL and cross entropy. Float32 (float64 for float64 inputs), all at once."""
    logits, total = _logits(tokens.hidden, weight), jnp.zeros((), jnp.promote_types(tokens.hidden.dtype, jnp.float32))
    if tokens.kl_share is not None:
        loss = _divergence(options, logits / options.temperature, tokens.teacher, weight_teacher)
        total += jnp.sum(jnp.where(tokens.kl_share != 0, tokens.kl_share * loss, 0.0))
    if tokens.ce_share is not None:
        labels = jnp.where(tokens.ce_share != 0, tokens.labels, 0)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
        total -= jnp.sum(jnp.where(tokens.ce_share != 0, tokens.ce_share * picked, 0.0))
    return total


def _divergence(options: Options, student: jax.Array, teacher, weight_teacher) -> jax.Array:
    log_q = jax.nn.log_softmax(student)
    if isinstance(teacher, TopK):
        return _bucketed(teacher.indices, teacher.log_probs, teacher.tail_mass, log_q)
    log_p = jax.nn.log_softmax(_logits(teacher, weight_teacher) / options.temperature)
    log_p = jax.lax.stop_gradient(log_p)
    if options.top_k is None:
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    values, indices = jax.lax.top_k(log_p, options.top_k)
    if options.tail == "renormalise":
        return _bucketed(indices, jax.nn.log_softmax(values), jnp.zeros_like(values[..., 0]), log_q)
    tail = jnp.sum(jnp.exp(jnp.where(_hot(indices, log_p), -jnp.inf, log_p)), axis=-1)
    return _bucketed(indices, values, tail, log_q)


def _bucketed(indices, log_probs, tail_mass, log_q) -> jax.Array:
    q_tail = jnp.sum(jnp.where(_hot(indices, log_q), 0.0, jnp.exp(log_q)), axis=-1)
    loss = jnp.sum(jnp.exp(log_probs) * (log_probs - jnp.take_along_axis(log_q, indices, axis=-1)), axis=-1)
    has_tail = tail_mass > 0
    ratio = jnp.where(has_tail, tail_mass, 1.0) / jnp.where(has_tail, q_tail, 1.0)
    return loss + tail_mass * jnp.log(ratio)


def _hot(indices: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.any(indices[..., None] == jnp.arange(x.shape[-1]), axis=-2)


def _logits(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    # The weight meets the hidden states in their dtype, as it does in the model.
    weight = weight.astype(hidden.dtype).astype(dtype)
    return jnp.matmul(hidden.astype(dtype), weight, precision=jax.lax.Precision.HIGHEST)


def _refuses(*, weight, tokens: Tokens, options: Options) -> str | None:
    return None if options.vocab_axis is None else "it does not shard the vocabulary"


BACKEND = Backend("reference", linear_loss, _refuses)
