"""Samples and windows packed into one row score as they do alone."""

from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import hypenet_jax as hn
from hypenet_jax.errors import HypenetError
from hypenet_jax.evals import niah, perplexity
from hypenet_jax.evals.packed import packed_windows, score_packed
from hypenet_jax.evals.token_nll import bind


@pytest.fixture(scope="module")
def student(byte_teacher):
    """A HypeNet of one attention and one Lightning layer, whose scaling would show wrong positions."""
    model, params = hn.load(byte_teacher)
    model, params = hn.convert(model, params, [1])
    return model.with_logits_scaling(20.0), params


@pytest.fixture(scope="module")
def samples(student):
    """Samples of two lengths; every other one asks for what the model itself would say, in one way or the other."""
    model, params = student
    made = [niah.make_samples("S1", model.tokenizer, length, 6, answer_budget=16) for length in (500, 560)]
    asked = []
    for i, sample in enumerate([*made[0], *made[1]]):
        said: list[int] = []
        for _ in range(3):
            ids = np.asarray([[*sample.prompt_ids, *said]], np.int32)
            padded = np.pad(ids, ((0, 0), (0, 576 - ids.shape[1])))
            segments = np.where(np.arange(576) < ids.shape[1], 0, -1)[None].astype(np.int32)
            logits = model.logits(params, padded, segments)[0, ids.shape[1] - 1]
            said.append(int(np.argmax(logits)))
        wrong = tuple((token + 1) % 256 for token in said)
        answer, other = [(tuple(said), wrong), (wrong, tuple(said)), (wrong, wrong)][i % 3]
        asked.append(dataclasses.replace(sample, answer_ids=answer, alternative_ids=other))
    return asked


@pytest.mark.parametrize(("row_tokens", "alternatives"), [(560, True), (1100, False), (1700, True)])
def test_packed_scores_are_those_of_single_rows(student, samples, row_tokens, alternatives):
    model, params = student
    alone = niah.score_forced(model, params, samples, 2, alternatives=alternatives)
    packed = score_packed(bind(model, params), samples, row_tokens, alternatives=alternatives)
    assert packed == alone
    assert sum(packed.correct) == (8 if alternatives else 4)


@hypothesis.given(count=st.integers(1, 7), length=st.integers(1, 40), row=st.integers(40, 130), seed=st.integers(0, 9))
def test_packed_windows_hold_every_token_once(count, length, row, seed):
    windows = np.random.default_rng(seed).integers(0, 256, (count, length + 1), dtype=np.int32)

    def nll(tokens, targets, segments):
        # Tells token, target and position apart; padding is seen by its segment.
        return np.where(segments >= 0, tokens + 1000.0 * targets, 0.0), targets >= 0

    got = perplexity.window_loss(nll, None, packed_windows(windows, row), 1)
    wanted = perplexity.window_loss(nll, None, windows, count)
    np.testing.assert_array_equal(got.nll_T, wanted.nll_T)
    np.testing.assert_array_equal(got.count_T, wanted.count_T)


def test_the_loss_of_packed_windows_is_that_of_windows(student):
    model, params = student
    windows = np.random.default_rng(0).integers(0, 256, (5, 101), dtype=np.int32)
    got = perplexity.window_loss(model, params, packed_windows(windows, 256), 1)
    assert got.nll == pytest.approx(perplexity.window_loss(model, params, windows, 5).nll, rel=1e-6)


def test_what_does_not_fit_is_refused(student, samples):
    with pytest.raises(HypenetError, match="row_tokens is 510 but 560 tokens"):
        score_packed(bind(*student), samples, 510)
    with pytest.raises(HypenetError, match="row_tokens is 10 but 20 tokens"):
        next(packed_windows(np.zeros((1, 21), np.int32), 10))
    with pytest.raises(HypenetError, match="no samples"):
        score_packed(bind(*student), [], 10)
