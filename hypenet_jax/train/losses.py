"""The two losses of HALO's full-model stages, in chunks of tokens: no [B, T, V] array is ever built."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from hypenet_jax.parallel.sharded_kernels import linear_cross_entropy, linear_kl


def distill_loss(
    student_BTD: jax.Array,
    student_head_DV: jax.Array,
    teacher_BTE: jax.Array,
    teacher_head_EV: jax.Array,
    batch: Mapping[str, jax.Array],
    *,
    token_chunk: int | None = None,
    temperature: float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """KL(teacher || student) over the whole vocabulary, mean over the tokens that are not padding (HALO, stage 2).

    Args:
      student_BTD, teacher_BTE: hidden states after the final norm; widths may differ.
      student_head_DV, teacher_head_EV: the output matrices, over the same vocabulary.
      batch: "segment_ids" int32 [B, T]; negative is padding.
      token_chunk: about how many tokens' logits are held at a time; None chooses by the vocabulary.
      temperature: divides both models' logits.

    Returns:
      (loss in nats, float32; {"count": tokens in the mean}).
    """
    loss, count = linear_kl(
        student_BTD,
        student_head_DV,
        jax.lax.stop_gradient(teacher_BTE),
        jax.lax.stop_gradient(teacher_head_EV),
        batch["segment_ids"] >= 0,
        token_chunk=token_chunk,
        temperature=temperature,
    )
    return loss, {"count": count}


def lm_loss(
    hidden_BTD: jax.Array, head_DV: jax.Array, batch: Mapping[str, jax.Array], *, token_chunk: int | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Next-token cross-entropy, mean over the tokens whose target belongs to their document (HALO, stage 3).

    Args:
      hidden_BTD: hidden states after the final norm.
      head_DV: the output matrix.
      batch: "targets" int32 [B, T] and "loss_mask" bool [B, T].
      token_chunk: about how many tokens' logits are held at a time; None chooses by the vocabulary.

    Returns:
      (loss in nats, float32; {"count": tokens in the mean}).
    """
    loss, count = linear_cross_entropy(
        hidden_BTD, head_DV, batch["targets"], batch["loss_mask"], token_chunk=token_chunk
    )
    return loss, {"count": count}
