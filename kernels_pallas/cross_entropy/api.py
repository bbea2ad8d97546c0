"""The public functions of the fused projection and loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch
from kernels_pallas.cross_entropy import gpu, reference, xla
from kernels_pallas.cross_entropy.sweep import Tokens
from kernels_pallas.cross_entropy.terms import Options, TopK

KL_BACKENDS = BACKENDS = dispatch.table(gpu.BACKEND, xla.BACKEND, reference.BACKEND)
TAILS = ("bucket", "renormalise")


def linear_kl(
    hidden_student: jax.Array,
    weight_student: jax.Array,
    hidden_teacher: jax.Array,
    weight_teacher: jax.Array,
    mask: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    tail: str = "bucket",
    labels: jax.Array | None = None,
    ce_weight: float = 0.0,
    ce_mask: jax.Array | None = None,
    vocab_axis: str | None = None,
    token_chunk: int | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Mean over the mask of `KL(softmax(h_t W_t / tau) || softmax(h_s W_s / tau))`, in nats (HALO's stage-2 loss).

    Differentiable in `hidden_student` and `weight_student`; the teacher gets no gradient. Logits accumulate in float32
    from operands of the hidden states' dtype, and so does the weight's gradient, whatever the chunk. There is no factor
    tau^2.

    Args:
      hidden_student: [N,D] or [B,T,D]; chunks are cut along N or T, so that a batch axis may be sharded.
      weight_student: [D,V] (a tied head passes the transposed embedding).
      hidden_teacher, weight_teacher: the same for the teacher, whose D may differ.
      mask: bool [N] or [B,T].
      temperature: tau > 0.
      top_k: None for the teacher's whole distribution, or the number of its likeliest entries that are told apart.
      tail: with `top_k`, what becomes of the teacher's other entries. "bucket": they are one more outcome, and so are
        the student's: the exact KL of the k+1 outcomes, a lower bound of the whole KL, 0 for a student like its
        teacher. "renormalise": they are dropped and the k probabilities scaled to sum 1, against the student's
        probabilities over the whole vocabulary: biased (a student like its teacher pays -log of the kept mass).
      labels, ce_weight, ce_mask: the loss is `(1 - ce_weight) * KL + ce_weight * CE`, where CE is the mean over
        `ce_mask` (None: the mask) of `-log softmax(h_s W_s)[label]`, at temperature 1; one sweep makes both.
      vocab_axis: within `shard_map`, the mesh axis over which the vocabulary lies: weights are this shard's columns
        [D,V/P], in the order of the axis, labels count over all shards, and hidden states, masks and results are alike
        on every shard. Gradients follow JAX's rules: the weight's is this shard's, and the hidden states' is summed
        over the axis where they are typed as not varying over it (with check_vma=False: at the edge of `shard_map`).
      token_chunk: about how many tokens' logits exist at once; None chooses by V.
      backend: a name in `KL_BACKENDS`, or "auto".

    Returns:
      The loss (0 where nothing is unmasked) and the number of unmasked tokens, both float32 scalars. Under `shard_map`
      with the tokens over another axis both are of this shard's tokens.

    Raises:
      ValueError: shapes or options disagree, or no backend (or not the named one) supports the call.
    """
    _check("student", hidden_student, weight_student, mask)
    _check("teacher", hidden_teacher, weight_teacher, mask)
    if weight_student.shape[1] != weight_teacher.shape[1]:
        entries = (weight_student.shape[1], weight_teacher.shape[1])
        raise ValueError(f"the student's vocabulary has {entries[0]} entries and the teacher's {entries[1]}")
    if tail not in TAILS:
        raise ValueError(f"tail is {tail!r} but must be one of {', '.join(TAILS)}")
    options = _options(weight_student, temperature, vocab_axis, token_chunk, top_k, tail)
    hidden_teacher, weight_teacher = jax.lax.stop_gradient((hidden_teacher, weight_teacher))
    tokens, count = _mixture(hidden_student, hidden_teacher, mask, labels, ce_weight, ce_mask)
    return _run("linear_kl", backend, weight_student, weight_teacher, tokens, options), count


def linear_kl_from_top_k(
    hidden: jax.Array,
    weight: jax.Array,
    indices: jax.Array,
    log_probs: jax.Array,
    tail_mass: jax.Array,
    mask: jax.Array,
    *,
    temperature: float = 1.0,
    labels: jax.Array | None = None,
    ce_weight: float = 0.0,
    ce_mask: jax.Array | None = None,
    vocab_axis: str | None = None,
    token_chunk: int | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`linear_kl` with `top_k` from a teacher kept on disk instead of its hidden states and weight.

    Args:
      hidden, weight, mask and every option: as in `linear_kl`; `temperature` divides the student's logits only.
      indices: int [N,k] or [B,T,k], different entries of the whole vocabulary.
      log_probs: [N,k] or [B,T,k], the teacher's, at that temperature.
      tail_mass: [N] or [B,T], the teacher's probability of all other entries; zeros where there is to be no bucket.

    Returns:
      As `linear_kl`.

    Raises:
      ValueError: shapes or options disagree, or no backend (or not the named one) supports the call.
    """
    _check("student", hidden, weight, mask)
    if indices.ndim != mask.ndim + 1 or indices.shape[:-1] != mask.shape or log_probs.shape != indices.shape:
        shapes = f"{indices.shape} and the log-probabilities {log_probs.shape}"
        raise ValueError(f"the teacher's indices have shape {shapes} but both must be the mask's {mask.shape} and k")
    if tail_mass.shape != mask.shape:
        raise ValueError(f"the tail's mass has shape {tail_mass.shape} but the mask {mask.shape}")
    options = _options(weight, temperature, vocab_axis, token_chunk, indices.shape[-1], "bucket")
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    teacher = jax.lax.stop_gradient(TopK(indices, log_probs.astype(dtype), tail_mass.astype(dtype)))
    tokens, count = _mixture(hidden, teacher, mask, labels, ce_weight, ce_mask)
    return _run("linear_kl", backend, weight, None, tokens, options), count


def linear_cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    vocab_axis: str | None = None,
    token_chunk: int | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Mean over the mask of `-log softmax(h W)[label]`, in nats. Differentiable in `hidden` and `weight`.

    Args:
      hidden, weight, mask, vocab_axis, token_chunk, backend: as in `linear_kl`.
      labels: int32 [N] or [B,T]; where the mask is False any integer.

    Returns:
      The mean (0 where the mask is all False) and the number of unmasked tokens, both float32 scalars.

    Raises:
      ValueError: shapes disagree, or no backend (or not the named one) supports the call.
    """
    _check("model", hidden, weight, mask)
    options = _options(weight, 1.0, vocab_axis, token_chunk)
    _check_labels("mask", labels, mask)
    share, count = _shares(1.0, mask, hidden.dtype)
    tokens = Tokens(hidden, None, labels, None, share)
    return _run("linear_cross_entropy", backend, weight, None, tokens, options), count


def _run(kernel: str, backend: str, weight, weight_teacher, tokens: Tokens, options: Options) -> jax.Array:
    call = {"weight": weight, "tokens": tokens, "options": options}
    return dispatch.choose(kernel, BACKENDS, backend, call).function(weight, weight_teacher, tokens, options=options)


def _mixture(hidden, teacher, mask, labels, ce_weight: float, ce_mask) -> tuple[Tokens, jax.Array]:
    if not 0 <= ce_weight <= 1:
        raise ValueError(f"ce_weight is {ce_weight} but must lie between 0 and 1")
    kl_share, count = _shares(1 - ce_weight, mask, hidden.dtype)
    if ce_weight == 0:
        return Tokens(hidden, teacher, None, kl_share, None), count
    if labels is None:
        raise ValueError(f"ce_weight is {ce_weight} but there are no labels: pass labels too")
    ce_mask = mask if ce_mask is None else ce_mask
    if ce_mask.shape != mask.shape:
        raise ValueError(f"ce_mask has shape {ce_mask.shape} but the mask {mask.shape}")
    _check_labels("mask", labels, mask)
    return Tokens(hidden, teacher, labels, kl_share, _shares(ce_weight, ce_mask, hidden.dtype)[0]), count


def _shares(weight: float, mask: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Every token's share in the weighted mean over the mask, and the number of unmasked tokens."""
    count = jnp.sum(mask, dtype=jnp.promote_types(dtype, jnp.float32))
    return jnp.where(mask, weight / jnp.maximum(count, 1.0), 0.0), count


def _options(weight, temperature, vocab_axis, token_chunk, top_k=None, tail="bucket") -> Options:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature} but must be positive")
    if token_chunk is not None and token_chunk < 1:
        raise ValueError(f"token_chunk is {token_chunk} but must be at least 1")
    shards = 1
    if vocab_axis is not None:
        manual = jax.sharding.get_abstract_mesh().manual_axes
        if vocab_axis not in manual:
            axes = ", ".join(manual) or "no axis"
            raise ValueError(
                f"vocab_axis is {vocab_axis!r} but must be an axis of an enclosing shard_map ({axes} here)"
            )
        shards = jax.lax.axis_size(vocab_axis)
    if top_k is not None and not 1 <= top_k <= shards * weight.shape[1]:
        raise ValueError(
            f"top_k is {top_k} but must lie between 1 and the {shards * weight.shape[1]} vocabulary entries"
        )
    return Options(float(temperature), top_k, tail, vocab_axis, token_chunk)


def _check_labels(name: str, labels: jax.Array, mask: jax.Array) -> None:
    if labels.shape != mask.shape:
        raise ValueError(f"labels have shape {labels.shape} but the {name} {mask.shape}")


def _check(whose: str, hidden: jax.Array, weight: jax.Array, mask: jax.Array) -> None:
    if hidden.ndim not in (2, 3) or min(hidden.shape) < 1:
        raise ValueError(f"the {whose}'s hidden states have shape {hidden.shape} but must be [N,D] or [B,T,D]")
    if weight.ndim != 2 or weight.shape[0] != hidden.shape[-1]:
        raise ValueError(f"the {whose}'s weight has shape {weight.shape} but must be [{hidden.shape[-1]},V]")
    if mask.shape != hidden.shape[:-1]:
        raise ValueError(f"the mask has shape {mask.shape} but the {whose}'s hidden states {hidden.shape}")
