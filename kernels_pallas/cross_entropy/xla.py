"""The losses in chunks of tokens, in plain XLA: never more than one chunk of logits, forward or backward.

The gradient is made in the forward sweep when one is asked for. It needs the very logits that the loss has just made,
so that cross entropy costs three products with the vocabulary instead of the four of a backward that makes them anew
(KL: four instead of six). What waits for the backward is the gradient itself, scaled there by the loss's cotangent.
A loss that nobody differentiates makes no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import Backend

# Tokens a chunk. Measured on two CPU cores (width 128, forward and backward): at V=257 1024 to 2048 tokens are best, at
# V=4096 256 for KL (half the time of 1024) and 128 to 512 alike for cross entropy.
# With a large vocabulary every chunk reads and writes a large weight gradient, which asks for more (not yet measured).
CACHED_LOGITS = 2**20
LARGE_VOCABULARY = 2**14
MIN_TOKENS, MAX_TOKENS, LARGE_VOCABULARY_TOKENS = 128, 2048, 512


class Static(NamedTuple):
    terms: Callable[..., tuple[jax.Array, jax.Array]]
    temperature: float
    token_chunk: int | None


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
    """See `api.linear_kl`."""
    static = Static(_kl, temperature, token_chunk)
    return _jitted(static, hidden_student, weight_student, hidden_teacher, weight_teacher, mask)


def linear_cross_entropy(
    hidden: jax.Array, weight: jax.Array, labels: jax.Array, mask: jax.Array, *, token_chunk: int | None
) -> tuple[jax.Array, jax.Array]:
    """See `api.linear_cross_entropy`."""
    return _jitted(Static(_cross_entropy, 1.0, token_chunk), hidden, weight, labels, None, mask)


@partial(jax.jit, static_argnums=0)
def _jitted(static: Static, hidden, weight, target, weight_teacher, mask):
    if hidden.ndim == 2:
        hidden, target, mask = hidden[None], target[None], mask[None]
    return _mean_loss(static, hidden, weight, target, weight_teacher, mask)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean_loss(static: Static, hidden_BTD, weight, target_BT, weight_teacher, mask_BT):
    return _sweep(static, hidden_BTD, weight, target_BT, weight_teacher, mask_BT, gradient=False)[0]


def _forward(static: Static, hidden_BTD, weight, target_BT, weight_teacher, mask_BT):
    result, gradients = _sweep(static, hidden_BTD, weight, target_BT, weight_teacher, mask_BT, gradient=True)
    # An empty array remembers the dtype in which the weight's gradient is due.
    return result, (*gradients, jnp.zeros(0, weight.dtype))


def _backward(static: Static, residuals, cotangents):
    dhidden, dweight, like_weight = residuals
    dmean, _ = cotangents
    return (dmean * dhidden).astype(dhidden.dtype), (dmean * dweight).astype(like_weight.dtype), None, None, None


_mean_loss.defvjp(_forward, _backward)


def _sweep(static: Static, hidden_BTD, weight, target_BT, weight_teacher, mask_BT, gradient: bool):
    """The mean and the count; and, if asked for, the mean's gradients (dhidden [B,T,D], dweight float32 [D,V])."""
    batch, length, _ = hidden_BTD.shape
    chunk = _chunk(static.token_chunk, batch, length, weight.shape[1])
    dtype = hidden_BTD.dtype
    weight = weight.astype(dtype)
    if weight_teacher is not None:
        weight_teacher = weight_teacher.astype(target_BT.dtype)
    count = jnp.sum(mask_BT, dtype=jnp.float32)
    share = 1.0 / jnp.maximum(count, 1.0)

    def tokens(carry, x):
        total, dweight = carry
        hidden, target, mask = x
        logits = _logits(static, hidden, weight)
        loss, dlogits = static.terms(static, logits, target, weight_teacher)
        total = total + jnp.sum(jnp.where(mask, loss, 0.0))
        if not gradient:
            return (total, None), None
        dlogits = jnp.where(mask[..., None], dlogits * (share / static.temperature), 0.0).astype(dtype)
        dot = partial(jnp.einsum, precision=_precision(dtype), preferred_element_type=jnp.float32)
        dweight = dweight + dot("btd,btv->dv", hidden, dlogits)
        return (total, dweight), dot("btv,dv->btd", dlogits, weight).astype(dtype)

    dweight = jnp.zeros_like(weight, jnp.float32) if gradient else None
    xs = tuple(_to_chunks(chunk, x) for x in (hidden_BTD, target_BT, mask_BT))
    start = (jnp.zeros_like(hidden_BTD[0, 0, 0], jnp.float32), dweight)
    (total, dweight), dhidden = jax.lax.scan(tokens, start, xs)
    if gradient:
        dhidden = jnp.swapaxes(dhidden, 0, 1).reshape(batch, -1, hidden_BTD.shape[-1])[:, :length]
    return (share * total, count), (dhidden, dweight)


def _kl(static: Static, logits, hidden_teacher, weight_teacher):
    """KL a token and its gradient in the student's scaled logits."""
    log_student = jax.nn.log_softmax(logits)
    log_teacher = jax.nn.log_softmax(_logits(static, hidden_teacher, weight_teacher))
    teacher = jnp.exp(log_teacher)
    return jnp.sum(teacher * (log_teacher - log_student), axis=-1), jnp.exp(log_student) - teacher


def _cross_entropy(static: Static, logits, labels, weight_teacher):
    del static, weight_teacher
    # A comparison and not a gather: it fuses, and stays local where the vocabulary is sharded.
    hot = labels[..., None] == jnp.arange(logits.shape[-1])
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    loss = log_sum - jnp.sum(jnp.where(hot, logits, 0.0), axis=-1)
    return loss, jnp.exp(logits - log_sum[..., None]) - hot


def _logits(static: Static, hidden: jax.Array, weight: jax.Array) -> jax.Array:
    logits = jnp.matmul(hidden, weight, precision=_precision(hidden.dtype), preferred_element_type=jnp.float32)
    return logits if static.temperature == 1.0 else logits / static.temperature


def _precision(dtype) -> jax.lax.Precision:
    # Without HIGHEST, accelerators would round float32 operands to bfloat16 or TF32.
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _chunk(token_chunk: int | None, batch: int, length: int, vocabulary: int) -> int:
    """Tokens of each row a chunk: near `token_chunk` in all rows together, and as even as the length allows."""
    cached = min(MAX_TOKENS, max(MIN_TOKENS, CACHED_LOGITS // vocabulary))
    wanted = token_chunk or (cached if vocabulary < LARGE_VOCABULARY else LARGE_VOCABULARY_TOKENS)
    chunks = -(-length // max(1, wanted // batch))
    return -(-length // chunks)


def _to_chunks(chunk: int, x_BT: jax.Array) -> jax.Array:
    """[B,T,...] -> [N,B,C,...], the tail filled up with zeros (False in the mask)."""
    batch, length = x_BT.shape[:2]
    x = jnp.pad(x_BT, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x_BT.ndim - 2))
    return jnp.swapaxes(x.reshape(batch, -1, chunk, *x.shape[2:]), 0, 1)


def _refuses(*, hidden, weight) -> str | None:
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}, and it accumulates in float32 from float32 or bfloat16 only"
    return None


KL_BACKEND = Backend("xla", linear_kl, _refuses)
BACKEND = Backend("xla", linear_cross_entropy, _refuses)
