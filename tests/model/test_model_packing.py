"""Documents packed in a row are the documents alone, and padding is nothing, wherever it stands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypenet_jax.model import LanguageModel, LogitsScaling
from hypenet_jax.model.context import training_context

T, MOST = 40, 6


@pytest.fixture(scope="module")
def hybrid(tiny_config, random_params) -> tuple[LanguageModel, dict]:
    model = LanguageModel(tiny_config("lal", attention_rope=True, logits_scaling=LogitsScaling("hype", 3.0)))
    return model, random_params(model)


@st.composite
def layouts(draw) -> list[tuple[int, int]]:
    """(id, tokens) of runs that fill T: documents with any ids (ids may recur in a later run), padding anywhere."""
    runs, left, documents = [], T, 0
    while left:
        padding = documents == MOST or draw(st.booleans())
        length = left if documents == MOST else draw(st.integers(1, left))
        earlier = [name for name, _ in runs if name >= 0]
        if padding:
            name = draw(st.integers(-3, -1))
        else:
            # A neighbour with the same id would be the same document, also across padding.
            last = earlier[-1] if earlier else None
            name = draw(st.sampled_from([0, 1, 7, 2**31 - 1]).filter(lambda name: name != last))  # noqa: B023
            documents += 1
        runs.append((name, length))
        left -= length
    return runs


@given(layouts(), st.integers(0, 1000))
def test_packed_documents_equal_the_documents_alone(hybrid, runs, seed):
    model, params = hybrid
    tokens_T = np.random.default_rng(seed).integers(0, model.config.vocab_size, T)
    ids_T = np.concatenate([np.full(length, name, np.int32) for name, length in runs])
    packed = np.asarray(model.logits(params, tokens_T[None], ids_T[None]))[0]
    assert np.isfinite(packed).all()
    # Alone: one document a row without ids; what follows a document cannot reach back into it.
    starts = np.cumsum([0] + [length for _, length in runs])
    documents = [slice(a, a + length) for a, (name, length) in zip(starts, runs, strict=False) if name >= 0]
    alone_NT = np.zeros((MOST, T), tokens_T.dtype)
    for row, span in enumerate(documents):
        alone_NT[row, : span.stop - span.start] = tokens_T[span]
    alone = np.asarray(model.logits(params, alone_NT))
    for row, span in enumerate(documents):
        expected = alone[row, : span.stop - span.start]
        np.testing.assert_allclose(packed[span], expected, rtol=1e-5, atol=1e-5 * np.abs(alone).max())


@given(st.lists(st.booleans(), min_size=T, max_size=T), st.integers(0, 1000))
def test_padding_inside_a_document_is_nothing(hybrid, valid, seed):
    """One document with holes is the document without them, and what stands in the holes does not matter."""
    model, params = hybrid
    valid_T, rng = np.array(valid), np.random.default_rng(seed)
    tokens_T, other_T = rng.integers(0, model.config.vocab_size, (2, T))
    ids_T = np.where(valid_T, 5, -1)
    got = np.asarray(model.logits(params, tokens_T[None], ids_T[None]))[0]
    changed = np.asarray(model.logits(params, np.where(valid_T, tokens_T, other_T)[None], ids_T[None]))[0]
    np.testing.assert_array_equal(got[valid_T], changed[valid_T])
    dense = np.zeros((MOST, T), tokens_T.dtype)
    dense[0, : valid_T.sum()] = tokens_T[valid_T]
    expected = np.asarray(model.logits(params, dense))[0]
    np.testing.assert_allclose(got[valid_T], expected[: valid_T.sum()], rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_padding_gets_no_gradient(hybrid):
    model, params = hybrid
    tokens = np.array([[3, 4, 5, 6, 7, 8]])
    ids = np.array([[-1, 0, 0, -1, 1, -1]])

    def loss(params):
        return jnp.sum(jnp.square(model.logits(params, tokens, ids)) * (ids >= 0)[..., None])

    # Untied, so that the gradient of the embedding is that of the inputs alone.
    gradient = jax.jit(jax.grad(loss))(params | {"lm_head": params["embedding"].T})["embedding"]
    assert np.isfinite(gradient).all()
    assert not np.any(gradient[np.array([3, 6, 8])]) and np.all(np.any(gradient[np.array([4, 5, 7])] != 0, axis=-1))


def test_context_counts_positions_and_documents():
    ids = jnp.asarray([[-1, 7, 7, -2, 7, 3, -1, 7, 7], [0, 0, 0, 0, 0, 0, 0, 0, 0], [-1] * 9])
    context = training_context(ids, ids)
    np.testing.assert_array_equal(
        context.positions_BT, [[0, 0, 1, 0, 2, 0, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8], [0] * 9]
    )
    np.testing.assert_array_equal(context.segment_ids_BT, [[-1, 0, 0, -1, 0, 1, -1, 2, 2], [0] * 9, [-1] * 9])


def test_context_without_documents():
    context = training_context(jnp.zeros((2, 4), jnp.int32), None)
    np.testing.assert_array_equal(context.positions_BT, [[0, 1, 2, 3]])
    assert context.segment_ids_BT is None
