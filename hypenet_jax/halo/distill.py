"""Stage 2 of HALO: the hybrid learns the frozen teacher's distribution, token by token, exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hypenet_jax.halo.settings import ObjectiveConfig
from hypenet_jax.model import LanguageModel
from hypenet_jax.parallel.sharded_kernels import linear_kl_from_top_k
from hypenet_jax.train.losses import distill_loss, lm_loss

EXACT_KL = dataclasses.asdict(ObjectiveConfig())


def distillation_loss(
    teacher: LanguageModel,
    student: LanguageModel,
    token_chunk: int | None,
    objective: Mapping[str, Any] = EXACT_KL,
) -> Callable:
    """loss(student_params, teacher_params, batch) -> (KL(teacher || student), metrics), teacher in the same step.

    Full vocabulary, temperature 1, mean over all real tokens; logits exist for `token_chunk` tokens at a time
    (arXiv 2601.22156, stage 2). `objective`: the fields of an `ObjectiveConfig`, numbers or traced scalars.
    """

    def loss(student_params: dict, teacher_params: dict, batch: dict):
        wanted = jax.lax.stop_gradient(teacher.hidden(teacher_params, batch["tokens"], batch["segment_ids"]))
        got = student.hidden(student_params, batch["tokens"], batch["segment_ids"])
        heads = student.head(student_params), teacher.head(teacher_params)
        return mixed_loss(got, wanted, heads, batch, objective, token_chunk)

    return loss


def mixed_loss(
    student_BTD: jax.Array,
    teacher_BTD: jax.Array,
    heads: tuple[jax.Array, jax.Array],
    batch: dict,
    weights: Mapping[str, Any],
    token_chunk: int | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, metrics) of `ObjectiveConfig`, whose fields `weights` holds as numbers or as traced scalars.

    A term whose weight is the number 0 is not computed. Every term is a sum divided by the number of real tokens, so
    that microbatches add up. heads: the student's and the teacher's output matrices. metrics: "count", and "kl", "ce"
    and "hidden" where more than the KL is computed.
    """
    ce_weight, hidden_weight, one_in = weights["ce_weight"], weights["hidden_weight"], weights["kl_one_in"]
    if _is(ce_weight, 0) and _is(hidden_weight, 0) and _is(one_in, 1):
        return distill_loss(student_BTD, heads[0], teacher_BTD, heads[1], batch, token_chunk=token_chunk)
    real_BT = batch["segment_ids"] >= 0
    count = jnp.sum(real_BT, dtype=jnp.float32)
    some_B1 = jnp.arange(real_BT.shape[0])[:, None] % one_in == 0
    ids_BT = jnp.where(some_B1, batch["segment_ids"], -1)
    mean, entered = distill_loss(
        student_BTD, heads[0], teacher_BTD, heads[1], batch | {"segment_ids": ids_BT}, token_chunk=token_chunk
    )
    terms = {"kl": mean * entered["count"] / jnp.maximum(count, 1.0)}
    total = (1 - ce_weight) * terms["kl"]
    if not _is(ce_weight, 0):
        mean, learned = lm_loss(student_BTD, heads[0], batch, token_chunk=token_chunk)
        terms["ce"] = mean * learned["count"] / jnp.maximum(count, 1.0)
        total += ce_weight * terms["ce"]
    if not _is(hidden_weight, 0):
        terms["hidden"] = relative_error(student_BTD, teacher_BTD, real_BT)
        total += hidden_weight * terms["hidden"]
    return total, terms | {"count": count}


def relative_error(student_BTD: jax.Array, teacher_BTD: jax.Array, real_BT: jax.Array) -> jax.Array:
    """mean |s - t|^2 / |t|^2 over the real tokens, float32, each token relative to the teacher's state at it."""
    wanted_BTD = teacher_BTD.astype(jnp.float32)
    error_BT = jnp.sum(jnp.square(student_BTD.astype(jnp.float32) - wanted_BTD), axis=-1)
    size_BT = jnp.maximum(jnp.sum(jnp.square(wanted_BTD), axis=-1), 1e-6)
    return jnp.sum(error_BT / size_BT * real_BT) / jnp.maximum(jnp.sum(real_BT, dtype=jnp.float32), 1.0)


def _is(weight: Any, number: float) -> bool:
    """Whether a weight is that number; a traced one may be any."""
    return isinstance(weight, (int, float)) and weight == number


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
