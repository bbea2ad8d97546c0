"""Needles and windows packed into rows of one width: one compiled program measures a model at all lengths.

A program of 30 layers takes a GPU's compiler tens of seconds, far longer than a model of 135M parameters takes to read
the samples; a row of 65,536 tokens holds 32 samples of 2,048 as documents of their own, of which none sees another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.niah import NiahSample, NiahScore, score_rows
from hypenet_jax.evals.token_nll import TokenNll
from hypenet_jax.parallel.processes import on_host


def score_packed(
    token_nll: TokenNll, samples: Sequence[NiahSample], row_tokens: int, *, alternatives: bool = True
) -> NiahScore:
    """What `niah.score_forced` measures, from rows of `row_tokens` tokens that hold several samples each.

    token_nll: of `token_nll.bind`. Raises HypenetError for a sample that is longer than a row.
    """
    if not samples:
        raise HypenetError("there are no samples to score; make at least 1")
    correct = _right(token_nll, samples, [sample.answer_ids for sample in samples], row_tokens)
    missed = [i for i, right in enumerate(correct) if not right and samples[i].alternative_ids]
    if alternatives and missed:
        again = [samples[i] for i in missed]
        answers = [sample.alternative_ids for sample in again]
        for i, right in zip(missed, _right(token_nll, again, answers, row_tokens), strict=True):
            correct[i] = right
    return NiahScore(tuple(correct), score_rows(samples, correct))


def packed_windows(windows: np.ndarray, row_tokens: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one row for `perplexity.window_loss`, of windows int32 [N, T + 1]; rows end in padding."""
    length = windows.shape[1] - 1
    _check_fits(length, row_tokens)
    each = row_tokens // length
    for start in range(0, len(windows), each):
        some = windows[start : start + each]
        tokens, targets, segments = _empty_row(row_tokens)
        used = len(some) * length
        tokens[0, :used], targets[0, :used] = some[:, :-1].ravel(), some[:, 1:].ravel()
        segments[0, :used] = np.repeat(np.arange(len(some)), length)
        yield {"tokens": tokens, "targets": targets, "segment_ids": segments, "loss_mask": segments >= 0}


def _right(
    token_nll: TokenNll, samples: Sequence[NiahSample], answers: Sequence[Sequence[int]], row_tokens: int
) -> list[bool]:
    """Whether every answer token of a sample is the argmax given the prompt and those before it."""
    found: list[bool] = []
    for group in _groups(samples, row_tokens):
        tokens, targets, segments = _empty_row(row_tokens)
        start, asked = 0, []
        for document, i in enumerate(group):
            ids = [*samples[i].prompt_ids, *answers[i]]
            stop = start + len(ids) - 1
            if stop - start > samples[i].length:
                raise HypenetError(
                    f"prompt and answer have {stop - start} tokens but the length is {samples[i].length}; raise it"
                )
            tokens[0, start:stop], targets[0, start:stop], segments[0, start:stop] = ids[:-1], ids[1:], document
            asked.append(slice(stop - len(answers[i]), stop))
            start += samples[i].length
        ok_T = on_host(token_nll(tokens, targets, segments)[1])[0]
        found += [bool(ok_T[answer].all()) for answer in asked]
    return found


def _groups(samples: Sequence[NiahSample], row_tokens: int) -> Iterator[list[int]]:
    """The samples of each row, in order; a row ends where the next sample does not fit."""
    group: list[int] = []
    room = row_tokens
    for i, sample in enumerate(samples):
        _check_fits(sample.length, row_tokens)
        if sample.length > room:
            yield group
            group, room = [], row_tokens
        group.append(i)
        room -= sample.length
    yield group


def _check_fits(length: int, row_tokens: int) -> None:
    if length > row_tokens:
        raise HypenetError(f"row_tokens is {row_tokens} but {length} tokens must fit into a row; raise it")


def _empty_row(row_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shape = (1, row_tokens)
    return np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
