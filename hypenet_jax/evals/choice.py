"""A cheap stand-in for common-sense benchmarks: which continuation of a held-out text is the real one?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.token_nll import bind, padded_rows
from hypenet_jax.parallel.processes import on_host


@dataclasses.dataclass(frozen=True)
class Choices:
    """Multiple-choice items as fixed-shape rows; item i is rows i*options .. (i+1)*options, the first of them right.

    int32 [N * options, T] tokens, targets, segment_ids; bool [N * options, T] mask of continuation targets.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    mask: np.ndarray
    options: int

    def __len__(self) -> int:
        return len(self.tokens) // self.options


def make_choices(
    documents: Iterable[Sequence[int] | np.ndarray],
    count: int,
    *,
    context: int = 96,
    continuation: int = 24,
    distractors: int = 3,
    seed: int = 0,
) -> Choices:
    """`count` items: `context` tokens of a held-out document, its own next `continuation` tokens, and as many tokens
    from random places of `distractors` other documents (HellaSwag's form, arXiv 1905.07830).

    documents: token ids; those shorter than context + continuation are not used. Deterministic by seed.
    Raises HypenetError when fewer than distractors + 1 documents are long enough.
    """
    if count < 1 or context < 1 or continuation < 1 or distractors < 1:
        raise HypenetError(
            f"count, context, continuation and distractors are {count}, {context}, {continuation} and {distractors}; "
            "each must be at least 1"
        )
    length = context + continuation
    usable = [np.asarray(document, np.int32) for document in documents if len(document) >= length]
    if len(usable) <= distractors:
        raise HypenetError(
            f"{len(usable)} documents have at least {length} tokens but {distractors + 1} are needed; "
            "give more or longer documents"
        )
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        # Every document serves once before any serves twice.
        if i % len(usable) == 0:
            order = rng.permutation(len(usable))
        own = int(order[i % len(usable)])
        others = rng.choice(np.delete(np.arange(len(usable)), own), distractors, replace=False)
        start = int(rng.integers(len(usable[own]) - length + 1))
        head = usable[own][start : start + context]
        rows.append(usable[own][start : start + length])
        for other in others:
            at = int(rng.integers(len(usable[other]) - continuation + 1))
            rows.append(np.concatenate([head, usable[other][at : at + continuation]]))
    stream = np.stack(rows)
    tokens, targets = stream[:, :-1], stream[:, 1:]
    mask = np.zeros(tokens.shape, bool)
    mask[:, context - 1 :] = True
    return Choices(tokens, targets, np.zeros(tokens.shape, np.int32), mask, distractors + 1)


def choice(model: Any, params: Any, choices: Choices, *, batch_size: int = 8) -> float:
    """The share of items whose real continuation has the lowest mean nll per token (a tie is wrong); in [0, 1].

    model: a LanguageModel, or a TokenNll function (then params is ignored). Rows go in batches of batch_size, one
    shape. Chance is 1 / options.
    """
    nll_fn = bind(model, params)
    means = []
    for start in range(0, len(choices.tokens), batch_size):
        nll_BT, _ = nll_fn(
            padded_rows(choices.tokens, start, batch_size),
            padded_rows(choices.targets, start, batch_size),
            padded_rows(choices.segment_ids, start, batch_size, fill=-1),
        )
        mask_BT = padded_rows(choices.mask, start, batch_size)
        nll_BT = np.where(mask_BT, on_host(nll_BT).astype(np.float64), 0.0)
        means.append(nll_BT.sum(axis=1) / np.maximum(mask_BT.sum(axis=1), 1))
    mean_NO = np.concatenate(means)[: len(choices.tokens)].reshape(-1, choices.options)
    return float(np.mean(mean_NO[:, 0] < mean_NO[:, 1:].min(axis=1)))
