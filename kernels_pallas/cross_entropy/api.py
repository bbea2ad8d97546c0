"""The public functions of the fused projection and loss."""

from __future__ import annotations

import jax

from kernels_pallas import dispatch
from kernels_pallas.cross_entropy import reference, xla

KL_BACKENDS = dispatch.table(xla.KL_BACKEND, reference.KL_BACKEND)
BACKENDS = dispatch.table(xla.BACKEND, reference.BACKEND)


def linear_kl(
    hidden_student: jax.Array,
    weight_student: jax.Array,
    hidden_teacher: jax.Array,
    weight_teacher: jax.Array,
    mask: jax.Array,
    *,
    token_chunk: int | None = None,
    temperature: float = 1.0,
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
      token_chunk: about how many tokens meet the vocabulary at once; None chooses by V.
      temperature: tau > 0.
      backend: a name in `KL_BACKENDS`, or "auto".

    Returns:
      The mean (0 where the mask is all False) and the number of unmasked tokens, both float32 scalars.

    Raises:
      ValueError: shapes disagree, or no backend (or not the named one) supports the call.
    """
    _check("student", hidden_student, weight_student, mask, token_chunk)
    _check("teacher", hidden_teacher, weight_teacher, mask, token_chunk)
    if weight_student.shape[1] != weight_teacher.shape[1]:
        entries = (weight_student.shape[1], weight_teacher.shape[1])
        raise ValueError(f"the student's vocabulary has {entries[0]} entries and the teacher's {entries[1]}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature} but must be positive")
    call = {"hidden": hidden_student, "weight": weight_student}
    return dispatch.choose("linear_kl", KL_BACKENDS, backend, call).function(
        hidden_student,
        weight_student,
        hidden_teacher,
        weight_teacher,
        mask,
        token_chunk=token_chunk,
        temperature=float(temperature),
    )


def linear_cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
    *,
    token_chunk: int | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Mean over the mask of `-log softmax(h W)[label]`, in nats. Differentiable in `hidden` and `weight`.

    Args:
      hidden, weight, mask, token_chunk, backend: as in `linear_kl`.
      labels: int32 [N] or [B,T]; where the mask is False any integer.

    Returns:
      The mean (0 where the mask is all False) and the number of unmasked tokens, both float32 scalars.

    Raises:
      ValueError: shapes disagree, or no backend (or not the named one) supports the call.
    """
    _check("model", hidden, weight, mask, token_chunk)
    if labels.shape != mask.shape:
        raise ValueError(f"labels have shape {labels.shape} but the mask {mask.shape}")
    chosen = dispatch.choose("linear_cross_entropy", BACKENDS, backend, {"hidden": hidden, "weight": weight})
    return chosen.function(hidden, weight, labels, mask, token_chunk=token_chunk)


def _check(whose: str, hidden: jax.Array, weight: jax.Array, mask: jax.Array, token_chunk: int | None) -> None:
    if hidden.ndim not in (2, 3) or min(hidden.shape) < 1:
        raise ValueError(f"the {whose}'s hidden states have shape {hidden.shape} but must be [N,D] or [B,T,D]")
    if weight.ndim != 2 or weight.shape[0] != hidden.shape[-1]:
        raise ValueError(f"the {whose}'s weight has shape {weight.shape} but must be [{hidden.shape[-1]},V]")
    if mask.shape != hidden.shape[:-1]:
        raise ValueError(f"the mask has shape {mask.shape} but the {whose}'s hidden states {hidden.shape}")
    if token_chunk is not None and token_chunk < 1:
        raise ValueError(f"token_chunk is {token_chunk} but must be at least 1")
