"""A cheap recall probe for layer selection: can the model repeat a fact that its context holds?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.token_nll import bind, padded_rows
from hypenet_jax.parallel.processes import on_host


@dataclasses.dataclass(frozen=True)
class RecallRows:
    """Fixed-shape rows of a recall probe: int32 [N, T] tokens, targets, segment_ids; bool [N, T] answer_mask."""

    tokens: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    answer_mask: np.ndarray


def recall_rows(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], length: int | None = None
) -> RecallRows:
    """Rows of prompt + answer, right-padded to `length` tokens (None: the longest row's).

    Raises HypenetError for an empty prompt or answer, or a row that does not fit.
    """
    if not prompts or len(prompts) != len(answers):
        raise HypenetError(f"recall got {len(prompts)} prompts and {len(answers)} answers; give as many, at least 1")
    if not all(len(p) and len(a) for p, a in zip(prompts, answers, strict=True)):
        raise HypenetError("recall got an empty prompt or answer; every one needs at least 1 token")
    longest = max(len(p) + len(a) - 1 for p, a in zip(prompts, answers, strict=True))
    length = length or longest
    if longest > length:
        raise HypenetError(f"a recall row has {longest} tokens but the length is {length}; raise the length")
    shape = (len(prompts), length)
    rows = RecallRows(
        np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, -1, np.int32), np.zeros(shape, bool)
    )
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = np.asarray([*prompt, *answer], np.int32)
        end = len(ids) - 1
        rows.tokens[row, :end], rows.targets[row, :end] = ids[:-1], ids[1:]
        rows.segment_ids[row, :end] = 0
        rows.answer_mask[row, len(prompt) - 1 : end] = True
    return rows


def recall(
    model: Any,
    params: Any,
    prompts: Sequence[Sequence[int]] | RecallRows,
    answers: Sequence[Sequence[int]] | None = None,
    *,
    batch_size: int = 8,
    length: int | None = None,
    whole: bool = False,
) -> float:
    """The share of answer tokens that are the argmax, teacher-forced; in [0, 1].

    model: a LanguageModel, or a TokenNll function (then params is ignored).
    prompts, answers: token ids (for NIAH samples: [s.prompt_ids ...], [s.answer_ids ...]), or RecallRows, which can
      be built once and used for many models; any batch with an answer mask has that form.
    whole: count an answer only when all its tokens are right.
    """
    rows = prompts if isinstance(prompts, RecallRows) else recall_rows(prompts, answers or (), length)
    nll_fn = bind(model, params)
    right, total = 0, 0
    for start in range(0, len(rows.tokens), batch_size):
        mask_BT = padded_rows(rows.answer_mask, start, batch_size)
        _, ok_BT = nll_fn(
            padded_rows(rows.tokens, start, batch_size),
            padded_rows(rows.targets, start, batch_size),
            padded_rows(rows.segment_ids, start, batch_size, fill=-1),
        )
        ok_BT = on_host(ok_BT)
        if whole:
            asked_B = mask_BT.any(axis=1)
            right += int(np.sum(asked_B & (ok_BT | ~mask_BT).all(axis=1)))
            total += int(asked_B.sum())
        else:
            right += int(np.sum(ok_BT & mask_BT))
            total += int(mask_BT.sum())
    if not total:
        raise HypenetError("recall got no answer token; mark at least 1 in the answer mask")
    return right / total
