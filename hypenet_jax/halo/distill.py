"""Stage 2 of HALO: the hybrid learns the frozen teacher's distribution, token by token, exactly."""

from __future__ import annotations

from collections.abc import Callable

import jax

from hypenet_jax.model import LanguageModel
from hypenet_jax.parallel.sharded_kernels import linear_kl_from_top_k
from hypenet_jax.train.losses import distill_loss


def distillation_loss(teacher: LanguageModel, student: LanguageModel, token_chunk: int | None) -> Callable:
    """loss(student_params, teacher_params, batch) -> (KL(teacher || student), metrics), teacher in the same step.

    Full vocabulary, temperature 1, mean over all real tokens; logits exist for `token_chunk` tokens at a time
    (arXiv 2601.22156, stage 2; the official code let one token in twelve enter the loss until April 2026).
    """

    def loss(student_params: dict, teacher_params: dict, batch: dict):
        wanted = jax.lax.stop_gradient(teacher.hidden(teacher_params, batch["tokens"], batch["segment_ids"]))
        got = student.hidden(student_params, batch["tokens"], batch["segment_ids"])
        return distill_loss(
            got, student.head(student_params), wanted, teacher.head(teacher_params), batch, token_chunk=token_chunk
        )

    return loss


def cached_distillation_loss(
    teacher: LanguageModel, student: LanguageModel, token_chunk: int | None, form: str
) -> Callable:
    """`distillation_loss` from a kept teacher output (see `teacher_cache`), which the batch carries.

    form "hidden": the same loss; the frozen tree holds the teacher's head alone. form "top-k": the KL of the k kept
    outcomes and of all others together, a lower bound of the whole KL; nothing is frozen.
    """

    def loss(student_params: dict, frozen: dict | None, batch: dict):
        got, head = student.hidden(student_params, batch["tokens"], batch["segment_ids"]), student.head(student_params)
        if form == "hidden":
            wanted = jax.lax.stop_gradient(batch["teacher_hidden"])
            return distill_loss(got, head, wanted, teacher.head(frozen or {}), batch, token_chunk=token_chunk)
        indices, log_probs, tail = (batch[f"teacher_{name}"] for name in ("indices", "log_probs", "tail"))
        real = batch["segment_ids"] >= 0
        mean, count = linear_kl_from_top_k(got, head, indices, log_probs, tail, real, token_chunk=token_chunk)
        return mean, {"count": count}

    return loss
