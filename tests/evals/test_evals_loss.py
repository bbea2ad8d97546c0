"""Losses of single tokens, perplexity, and the probes, against direct computations."""

from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals import choice, perplexity, recall, token_nll
from hypenet_jax.evals.intervals import wilson, wilson_of_seeds

VOCAB, WIDTH = 11, 5


@dataclasses.dataclass(frozen=True)
class Bigram:
    """A fake model whose hidden state is the token's embedding."""

    def hidden(self, params, tokens_BT, segment_ids=None):
        return params["embedding"][tokens_BT]

    def head(self, params):
        return params["head"]


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0))
    shapes = (VOCAB, WIDTH), (WIDTH, VOCAB)
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    return {"embedding": arrays[0], "head": arrays[1]}


def direct(params, tokens, targets):
    """float64 nll and argmax hits."""
    logits = np.asarray(params["embedding"], np.float64)[tokens] @ np.asarray(params["head"], np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, targets[..., None], -1)[..., 0], logits.argmax(-1) == targets


@hypothesis.given(chunk=st.sampled_from([1, 7, 16, 4096]), padded=st.booleans(), seed=st.integers(0, 99))
def test_token_nll_is_the_log_softmax(params, chunk, padded, seed):
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, VOCAB, (2, 3, 13), dtype=np.int32)
    segments = rng.integers(-1, 2, (3, 13), dtype=np.int32) if padded else None
    nll, ok = token_nll.token_nll(Bigram(), params, tokens, targets, segments, token_chunk=chunk)
    want_nll, want_ok = direct(params, tokens, targets)
    if padded:
        want_nll, want_ok = np.where(segments >= 0, want_nll, 0), want_ok & (segments >= 0)
    assert nll.dtype == jnp.float32
    np.testing.assert_allclose(nll, want_nll, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(ok, want_ok)


@pytest.mark.parametrize("rows,batch", [(4, 2), (5, 2), (1, 3)])
def test_perplexity_is_the_exponential_mean(params, rows, batch):
    windows = np.random.default_rng(rows).integers(0, VOCAB, (rows, 21)).astype(np.uint16)
    nll, _ = direct(params, windows[:, :-1], windows[:, 1:])
    assert perplexity.perplexity(Bigram(), params, windows, batch) == pytest.approx(np.exp(nll.mean()), rel=1e-6)
    buckets = perplexity.by_position(Bigram(), params, windows, batch, first_edge=3)
    assert [(b["start"], b["stop"]) for b in buckets] == [(0, 3), (3, 6), (6, 12), (12, 20)]
    for bucket in buckets:
        assert bucket["nll"] == pytest.approx(nll[:, bucket["start"] : bucket["stop"]].mean(), rel=1e-5)


def test_batches_of_packed_documents_count_positions_by_document(params):
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, VOCAB, (2, 2, 8), dtype=np.int32)
    segments = np.asarray([[0, 0, 0, 1, 1, 1, 1, -1], [-1, -1, 3, 3, 0, 0, 0, 0]], np.int32)
    mask = rng.random((2, 8)) < 0.7
    batch = {"tokens": tokens, "targets": targets, "segment_ids": segments, "loss_mask": mask}
    result = perplexity.window_loss(Bigram(), params, [batch, batch], 2)
    nll, _ = direct(params, tokens, targets)
    counted = mask & (segments >= 0)
    positions = np.asarray([[0, 1, 2, 0, 1, 2, 3, 0], [0, 0, 0, 1, 0, 1, 2, 3]])
    for position in range(4):
        where = counted & (positions == position)
        assert result.count_T[position] == 2 * where.sum()
        assert result.nll_T[position] == pytest.approx(2 * nll[where].sum(), rel=1e-5)
    assert result.perplexity == pytest.approx(np.exp(nll[counted].mean()), rel=1e-5)


def test_short_windows_may_end_in_padding(params):
    windows = np.asarray([[1, 2, 3, 4], [5, 6, -1, -1]])
    nll, _ = direct(params, np.asarray([1, 2, 3, 5]), np.asarray([2, 3, 4, 6]))
    assert perplexity.window_loss(Bigram(), params, windows, 2).nll == pytest.approx(nll.mean(), rel=1e-5)
    for bad in (np.zeros((0, 4), int), np.zeros((2, 1), int), np.full((1, 3), -1)):
        with pytest.raises(HypenetError):
            perplexity.perplexity(Bigram(), params, bad, 2)


def test_all_batches_have_one_shape(params):
    shapes = set()

    def spy(tokens, targets, segments):
        shapes.update((np.shape(tokens), np.shape(targets), np.shape(segments)))
        return token_nll.token_nll(Bigram(), params, tokens, targets, segments)

    windows = np.random.default_rng(0).integers(0, VOCAB, (5, 9))
    perplexity.perplexity(spy, None, windows, 2)
    assert shapes == {(2, 8)}
    shapes.clear()
    recall.recall(spy, None, [[1, 2], [3], [4, 5, 6]], [[7], [8, 9], [1]], batch_size=2, length=6)
    assert shapes == {(2, 6)}


def test_recall_counts_answer_tokens(params):
    following = np.asarray((params["embedding"] @ params["head"]).argmax(-1))
    right = [int(following[3]), int(following[following[3]])]
    wrong = [(right[0] + 1) % VOCAB]
    prompts, answers = [[1, 3], [2, 3], [3]], [right, wrong, right[:1]]
    assert recall.recall(Bigram(), params, prompts, answers, batch_size=2) == pytest.approx(3 / 4)
    assert recall.recall(Bigram(), params, prompts, answers, batch_size=2, whole=True) == pytest.approx(2 / 3)
    rows = recall.recall_rows(prompts, answers, length=7)
    assert recall.recall(Bigram(), params, rows, batch_size=3) == pytest.approx(3 / 4)
    for prompts, answers in (([], []), ([[1]], [[]]), ([[1]], [[1], [2]]), ([[1, 2]], [[3, 4]])):
        with pytest.raises(HypenetError):
            recall.recall(Bigram(), params, prompts, answers, length=2)


def test_choice_is_won_by_the_most_likely_continuation():
    documents = [np.arange(40) * 4 + d for d in range(4)]  # document d holds tokens equal to d modulo 4
    items = choice.make_choices(documents, 9, context=6, continuation=5, distractors=3, seed=3)
    assert len(items) == 9 and items.tokens.shape == (36, 10)
    streams = np.concatenate([items.tokens, items.targets[:, -1:]], axis=1).reshape(9, 4, 11) % 4
    assert (streams[:, 0] == streams[:, 0, :1]).all()
    assert (streams[:, 1:, :6] == streams[:, :1, :6]).all()
    assert all(len(set(item[:, 6])) == 4 for item in streams)
    assert (items.mask.sum(axis=1) == 5).all() and items.mask[:, 5:].all()

    def same_document(tokens, targets, segments):
        return (np.asarray(tokens) % 4 != np.asarray(targets) % 4).astype(np.float32), None

    assert choice.choice(same_document, None, items, batch_size=5) == 1.0
    assert choice.choice(lambda *batch: (-same_document(*batch)[0], None), None, items, batch_size=5) == 0.0
    assert choice.choice(lambda t, *_: (np.ones(t.shape), None), None, items, batch_size=5) == 0.0
    again = choice.make_choices(documents, 9, context=6, continuation=5, distractors=3, seed=3)
    np.testing.assert_array_equal(items.tokens, again.tokens)
    with pytest.raises(HypenetError, match="4 documents have at least 11 tokens but 5 are needed"):
        choice.make_choices(documents, 9, context=6, continuation=5, distractors=4)


@hypothesis.given(total=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_solves_its_equation(total, share):
    correct = round(share * total)
    low, high = wilson(correct, total)
    observed = correct / total
    assert 0 <= low <= observed <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            z = abs(observed - bound) / np.sqrt(bound * (1 - bound) / total)
            assert z == pytest.approx(1.959964, rel=1e-4)


def test_seeds_that_are_asked_the_same_needles_are_not_more_needles():
    assert wilson_of_seeds([(3, 10)]) == wilson(3, 10)
    assert wilson_of_seeds([(3, 10), (5, 10), (4, 10)]) == wilson(4, 10)
    assert wilson_of_seeds([(0, 4), (1, 4)]) == wilson(0.5, 4)


def test_wilson_of_known_counts():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
