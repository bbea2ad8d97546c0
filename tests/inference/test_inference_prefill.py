"""Prefill in chunks, with padding on any side, gives the logits of the full forward pass."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypenet_jax.errors import HypenetError
from hypenet_jax.inference import prefill
from hypenet_jax.inference.prefill import chunks

T, SLOTS = 40, 64


def _tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 61, shape)


@given(st.integers(1, 5000), st.integers(1, 600))
def test_chunks_cover_the_length_once(length, chunk):
    pieces = list(chunks(length, chunk))
    assert [start for start, _ in pieces] == list(range(0, length, chunk))
    assert all(width == chunk for _, width in pieces[:-1])
    start, width = pieces[-1]
    assert width >= length - start and (width < 4 * max(16, length - start) or width == chunk)
    assert width in {chunk // 4**n for n in range(6)}
    assert all(width == chunk for _, width in chunks(length, chunk, narrow_last=False))


@pytest.mark.parametrize("chunk", [5, 16, 512])
def test_chunked_equals_the_full_forward(hybrid, chunk):
    model, params = hybrid
    tokens_BT = _tokens(0, 3, T)
    full = np.asarray(model.logits(params, tokens_BT))[:, -1]
    cache, logits_BV = prefill(model, params, tokens_BT, max_len=SLOTS, chunk=chunk)
    np.testing.assert_allclose(logits_BV, full, rtol=1e-5, atol=5e-6 * np.abs(full).max())
    np.testing.assert_array_equal(cache["length"], [T] * 3)
    once, _ = prefill(model, params, tokens_BT, max_len=SLOTS, chunk=T)
    for piecewise, whole in zip(jax.tree.leaves(cache), jax.tree.leaves(once), strict=True):
        np.testing.assert_allclose(piecewise, whole, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(whole).max()))


@given(st.lists(st.integers(0, T), min_size=3, max_size=3), st.integers(0, 1000))
def test_every_row_gets_the_logits_of_its_last_token(hybrid, lengths, seed):
    model, params = hybrid
    tokens_BT = _tokens(seed, 3, T)
    lengths[0] = T  # the width of the matrix, so that shapes repeat
    valid_BT = np.arange(T) < np.array(lengths)[:, None]
    full = np.asarray(model.logits(params, tokens_BT))
    cache, logits_BV = prefill(model, params, tokens_BT, valid_BT, max_len=SLOTS, chunk=16)
    np.testing.assert_array_equal(cache["length"], lengths)
    for row, length in enumerate(lengths):
        if length:
            expected = full[row, length - 1]
            np.testing.assert_allclose(logits_BV[row], expected, rtol=1e-5, atol=5e-6 * np.abs(full).max())


@given(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=2, max_size=2), st.integers(0, 1000))
def test_padding_anywhere_equals_padding_right_to_the_bit(hybrid, masks, seed):
    """Left, right and in the middle, as a mask or as segment ids; junk under the padding does not matter."""
    model, params = hybrid
    valid_BT = np.array(masks)
    valid_BT[0, -20:], valid_BT[0, :-20] = True, False  # left padding, and a width that repeats
    valid_BT[1] &= np.cumsum(valid_BT[1]) <= 20
    tokens_BT = np.where(valid_BT, _tokens(seed, 2, T), -7)
    right_BT, right_valid_BT = np.zeros((2, 20), int), np.zeros((2, 20), bool)
    for row in range(2):
        count = valid_BT[row].sum()
        right_BT[row, :count], right_valid_BT[row, :count] = tokens_BT[row, valid_BT[row]], True
    expected_cache, expected = prefill(model, params, right_BT, right_valid_BT, max_len=SLOTS, chunk=16)
    ids_BT = np.where(valid_BT, 3, -2).astype(np.int32)
    for mask_BT in (valid_BT, ids_BT):
        cache, logits_BV = prefill(model, params, tokens_BT, mask_BT, max_len=SLOTS, chunk=16)
        np.testing.assert_array_equal(logits_BV, expected)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), cache, expected_cache))


@given(st.lists(st.integers(0, T), min_size=3, max_size=3), st.integers(0, 3), st.integers(0, 1000))
def test_neighbours_and_place_in_the_batch_change_no_bit(hybrid, lengths, place, seed):
    """At one batch shape, which is what `fixed_shapes` of generate rests on."""
    model, params = hybrid
    prompt_T, tokens_BT = _tokens(0, T), _tokens(seed, 4, T)
    expected = prefill(model, params, np.stack([prompt_T] * 4), max_len=SLOTS, chunk=16)[1][0]
    tokens_BT[place] = prompt_T
    valid_BT = np.arange(T) < np.insert(lengths, place, T)[:, None]
    got = prefill(model, params, tokens_BT, valid_BT, max_len=SLOTS, chunk=16)[1][place]
    np.testing.assert_array_equal(got, expected)


def test_unpadded_needs_no_mask(hybrid):
    model, params = hybrid
    tokens_BT = _tokens(1, 2, 20)
    _, plain = prefill(model, params, tokens_BT, max_len=SLOTS, chunk=16)
    _, masked = prefill(model, params, tokens_BT, np.ones((2, 20), bool), max_len=SLOTS, chunk=16)
    np.testing.assert_array_equal(plain, masked)


@pytest.mark.parametrize(
    "tokens, valid, options, message",
    [
        (np.zeros((2, 9), int), None, {"max_len": 8}, "longest prompt has 9 tokens and max_len is 8"),
        (np.full((1, 3), 61), None, {}, "token id 61; the vocabulary of the model is 0 to 60"),
        (np.full((1, 3), -1), None, {}, "token id -1"),
        (np.zeros((1, 3), int), np.array([[0, 0, 4]]), {}, "row 0 holds documents 0 and 4"),
        (np.zeros((1, 3), int), np.ones((1, 2), bool), {}, r"valid has shape \(1, 2\)"),
        (np.zeros(3, int), None, {}, r"tokens has shape \(3,\)"),
        (np.zeros((1, 3)), None, {}, "float64"),
        (np.zeros((1, 3), int), None, {"chunk": 0}, "prefill_chunk is 0"),
    ],
)
def test_errors(hybrid, tokens, valid, options, message):
    with pytest.raises(HypenetError, match=message):
        prefill(*hybrid, tokens, valid, **options)
