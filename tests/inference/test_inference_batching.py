"""Batches, shapes and padding."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hypenet_jax.inference.batching import align_left, batches, cache_size, pad_right, padded_rows


@given(st.lists(st.integers(1, 99), max_size=30), st.integers(1, 9))
def test_batches_hold_every_prompt_once_by_falling_length(lengths, batch_size):
    groups = batches(lengths, batch_size)
    order = [index for group in groups for index in group]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    assert all(len(group) == batch_size for group in groups[:-1])


@given(st.integers(1, 2**21))
def test_cache_size_bounds_waste_and_shapes(tokens):
    size = cache_size(tokens)
    assert tokens <= size < tokens + max(256, tokens / 4 + 1) and size % 256 == 0
    assert cache_size(size) == size


def test_cache_sizes_are_few():
    assert len({cache_size(tokens) for tokens in range(4096, 8192)}) <= 5


def test_padded_rows():
    assert [padded_rows(count, 8) for count in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]
    assert [padded_rows(count, 6) for count in (3, 5, 6)] == [4, 6, 6]


def test_pad_right_and_align_left():
    tokens_BT, valid_BT = pad_right([np.array([1, 2, 3]), np.array([4])], rows=3)
    np.testing.assert_array_equal(tokens_BT, [[1, 2, 3], [4, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(valid_BT, [[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    padded_BT = np.array([[9, 9, 1, 9, 2], [3, 9, 9, 9, 9]])
    tokens_BT, valid_BT = align_left(padded_BT, padded_BT != 9)
    np.testing.assert_array_equal(tokens_BT, [[1, 2], [3, 0]])
    np.testing.assert_array_equal(valid_BT, [[True, True], [True, False]])
