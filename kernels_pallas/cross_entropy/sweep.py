"""One sweep over chunks of tokens makes a loss of vocabulary logits and its gradients: never an array [tokens, V].

The gradient is made in the forward sweep when one is asked for. It needs the very logits that the loss has just made,
so that cross entropy costs three products with the vocabulary instead of the four of a backward that makes them anew
(KL: four instead of six). What waits for the backward is the gradient itself, scaled there by the loss's cotangent.
A loss that nobody differentiates makes no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import compat
from kernels_pallas.cross_entropy import terms
from kernels_pallas.cross_entropy.terms import Options, TopK

# Tokens whose float32 logits exist at once. Measured on two CPU cores (width 128, forward and backward): at V=257 1024
# to 2048 tokens are best, at V=4096 256 for KL (half the time of 1024) and 128 to 512 alike for cross entropy.
CACHED_LOGITS = 2**20
LARGE_VOCABULARY = 2**14
MIN_TOKENS, MAX_TOKENS = 128, 2048
# With a large vocabulary a product reads the whole weight for its few tokens, and a product for the weight's gradient
# reads and writes a float32 accumulator of that size. So many tokens a chunk, and the gradients of several chunks'
# logits, a quarter of the logits' own bytes, wait for one product. At V=151936 on an H100 512 x 4 is the fastest of
# those tried that hold less than 1.2 GiB of logits and gradients (docs/decisions/0015).
LARGE_VOCABULARY_TOKENS, CHUNKS_A_PRODUCT = 512, 4
# Rows that a TPU keeps together in bfloat16: chunks that start elsewhere are written twice.
ROWS_A_TILE = 16


class Tokens(NamedTuple):
    """Arrays [B,T,...] of what the loss knows of every token; or None.

    The shares are the tokens' float32 weights in the sum of losses, 0 where masked. `labels` and `ce_share` are None
    without cross entropy, `teacher` (hidden states, or a `TopK`) and `kl_share` without divergence.
    """

    hidden: Any
    teacher: Any
    labels: Any
    kl_share: Any
    ce_share: Any


# (options, student's logits, teacher's logits, tokens, wants a gradient, buffer, first row) -> (loss, buffer)
Stage = Callable[..., tuple[jax.Array, jax.Array | None]]


class Static(NamedTuple):
    options: Options
    stage: Stage


def total_loss(static: Static, weight: jax.Array, weight_teacher: jax.Array | None, tokens: Tokens) -> jax.Array:
    """Sum over tokens of their shares times their losses; differentiable in `tokens.hidden` and `weight`.

    Within `shard_map`, with `options.vocab_axis`: every shard sweeps its part of the vocabulary and the sum over the
    shards is taken outside the custom gradient, so that JAX's own rules for it and for inputs that do not vary over an
    axis make the cotangents right, with and without `check_vma`.
    """
    axis = static.options.vocab_axis
    arguments = (weight, weight_teacher, tokens)
    axes = frozenset(() if axis is None else (axis,))
    axes = axes.union(*(compat.varying_axes(x) for x in jax.tree.leaves(arguments)))
    weight, weight_teacher, tokens = jax.tree.map(lambda x: compat.vary(x, axes), arguments)
    loss = _total(static, tokens.hidden, weight, weight_teacher, tokens._replace(hidden=None))
    return loss if axis is None else jax.lax.psum(loss, axis)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(static: Static, hidden_BTD, weight, weight_teacher, tokens: Tokens):
    return _sweep(static, hidden_BTD, weight, weight_teacher, tokens, gradient=False)[0]


def _forward(static: Static, hidden_BTD, weight, weight_teacher, tokens: Tokens):
    result, gradients = _sweep(static, hidden_BTD, weight, weight_teacher, tokens, gradient=True)
    # An empty array remembers the dtype in which the weight's gradient is due.
    return result, (*gradients, jnp.zeros_like(weight[:0]))


def _backward(static: Static, residuals, dloss):
    dhidden, dweight, like_weight = residuals
    return (dloss * dhidden).astype(dhidden.dtype), (dloss * dweight).astype(like_weight.dtype), None, None


_total.defvjp(_forward, _backward)


def _sweep(static: Static, hidden_BTD, weight, weight_teacher, tokens: Tokens, gradient: bool):
    """The loss (with `vocab_axis` this shard's part of it) and, if asked for, its gradients in hidden and weight."""
    options = static.options
    batch, length, _ = hidden_BTD.shape
    entries, dtype = weight.shape[1], hidden_BTD.dtype
    chunk, step = chunking(options.token_chunk, batch, length, entries)
    tokens = tokens._replace(hidden=hidden_BTD)
    weight = weight.astype(dtype)
    if weight_teacher is not None:
        weight_teacher = weight_teacher.astype(tokens.teacher.dtype)

    def small_step(tokens, i, total, buffer):
        start, fresh, here = _cut(tokens, i, chunk)
        teacher = here.teacher if weight_teacher is None else logits(here.teacher, weight_teacher)
        loss, buffer = static.stage(options, logits(here.hidden, weight), teacher, here, gradient, buffer, start)
        return total + jnp.sum(jnp.where(fresh, loss, 0.0)), buffer

    def large_step(i, carry):
        total, dhidden, dweight, buffer = carry
        start, fresh, here = _cut(tokens, i, step)
        # Tokens that have had their turn get no share.
        shares = (None if x is None else jnp.where(fresh, x, 0.0) for x in (here.kl_share, here.ce_share))
        here = here._replace(**dict(zip(("kl_share", "ce_share"), shares, strict=True)))
        chunks = -(-step // chunk)
        total, buffer = jax.lax.fori_loop(0, chunks, lambda j, c: small_step(here, j, *c), (total, buffer))
        if not gradient:
            return total, None, None, None
        dot = partial(jnp.einsum, precision=_precision(dtype), preferred_element_type=jnp.float32)
        # A masked token's row of the buffer is zero, but its hidden states may be anything.
        live = sum((abs(x) for x in (here.kl_share, here.ce_share) if x is not None), jnp.zeros(())) > 0
        hidden = jnp.where(live[..., None], here.hidden, 0)
        dweight = dweight + dot("btd,btv->dv", hidden, buffer)
        new = dot("btv,dv->btd", buffer, weight).astype(dtype)
        old = jax.lax.dynamic_slice_in_dim(dhidden, start, step, 1)
        new = jnp.where(fresh[:, None], new, old)
        return total, jax.lax.dynamic_update_slice_in_dim(dhidden, new, start, 1), dweight, buffer

    carry: tuple[Any, ...] = jnp.zeros_like(hidden_BTD[0, 0, 0], jnp.float32), None, None, None
    if gradient:
        buffer = jnp.broadcast_to(jnp.zeros_like(hidden_BTD[0, 0, 0]), (batch, step, entries))
        carry = carry[0], jnp.zeros_like(hidden_BTD), jnp.zeros_like(weight, jnp.float32), buffer
    total, dhidden, dweight, _ = jax.lax.fori_loop(0, -(-length // step), large_step, carry)
    if options.vocab_axis is not None:
        total = total / jax.lax.axis_size(options.vocab_axis)
    return total, (dhidden, dweight)


def logits(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    """Float32, accumulated from operands of the hidden states' dtype."""
    return jnp.matmul(hidden, weight, precision=_precision(hidden.dtype), preferred_element_type=jnp.float32)


def _precision(dtype) -> jax.lax.Precision:
    # Without HIGHEST, accelerators would round float32 operands to bfloat16 or TF32.
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def chunking(token_chunk: int | None, batch: int, length: int, entries: int) -> tuple[int, int]:
    """Tokens of each row a chunk of logits (near `token_chunk` in all rows together), and a weight product.

    Chunks are cut along the length, so that a batch axis may be sharded, and as even as it allows.
    """
    large = entries >= LARGE_VOCABULARY
    cached = min(MAX_TOKENS, max(MIN_TOKENS, CACHED_LOGITS // entries))
    wanted = token_chunk or (LARGE_VOCABULARY_TOKENS if large else cached)
    in_a_row = max(1, wanted // batch)
    products, chunks = -(-length // in_a_row), 1
    if large and products > 1:
        # Two products at least: the gradients of all tokens' logits are never there together.
        products = max(2, -(-length // (CHUNKS_A_PRODUCT * in_a_row)))
        chunks = -(-length // (products * in_a_row))
    chunk = -(-length // (products * chunks))
    if large and chunk * chunks < length and length >= ROWS_A_TILE:
        chunk = -(-chunk // ROWS_A_TILE) * ROWS_A_TILE
    return chunk, min(chunk * chunks, length)


def _cut(tokens: Tokens, i: jax.Array, size: int) -> tuple[jax.Array, jax.Array, Tokens]:
    """The i-th piece of `size` tokens a row: where it starts, which of them are new, and the tokens.

    The last piece reaches back over tokens that have had their turn, so that nothing is padded.
    """
    length = tokens.hidden.shape[1]
    start = i * size if length % size == 0 else jnp.minimum(i * size, length - size)
    piece = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, 1), tokens)
    return start, start + jnp.arange(size) >= i * size, piece


def plain_stage(options: Options, student, teacher, tokens: Tokens, gradient: bool, buffer, start):
    """The loss of a chunk, its gradient in the student's logits written into `buffer` [B,T',V] from row `start` on."""
    parts = []
    if tokens.kl_share is not None:
        if options.top_k is not None and not isinstance(teacher, TopK):
            teacher = terms.top_k(options, teacher)
        divergence = terms.kl_top_k if isinstance(teacher, TopK) else terms.kl
        parts.append((tokens.kl_share, *divergence(options, student, teacher)))
    if tokens.ce_share is not None:
        parts.append((tokens.ce_share, *terms.cross_entropy(options, student, tokens.labels)))
    # A masked token has no part, whatever its hidden states hold.
    loss = sum((jnp.where(share != 0, share * loss, 0.0) for share, loss, _ in parts), jnp.zeros(()))
    if gradient:
        shared = ((share[..., None], dlogits) for share, _, dlogits in parts)
        dlogits = sum((jnp.where(share != 0, share * x, 0.0) for share, x in shared), jnp.zeros(()))
        buffer = jax.lax.dynamic_update_slice_in_dim(buffer, dlogits.astype(buffer.dtype), start, 1)
    return loss, buffer
