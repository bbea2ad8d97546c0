"""Prompts of unequal length as few batches of few shapes, because every new shape is a compilation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from hypenet_jax.errors import HypenetError


def as_prompts(prompts: Iterable[Sequence[int]], vocab_size: int) -> list[np.ndarray]:
    """Each prompt as int32 [T]. Raises HypenetError for an empty prompt and for a token id that is none."""
    arrays = []
    for index, prompt in enumerate(prompts):
        array = np.asarray(prompt)
        if array.size == 0:
            raise HypenetError(f"prompt {index} is empty; give at least one token (the model's bos or eos id will do)")
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise HypenetError(
                f"prompt {index} is an array of {array.dtype} with shape {array.shape}; give a list of token ids"
            )
        check_token_ids(array, vocab_size, f"prompt {index}")
        arrays.append(array.astype(np.int32))
    return arrays


def check_token_ids(ids: np.ndarray, vocab_size: int, owner: str) -> None:
    """Raise HypenetError naming the first id outside 0 .. vocab_size - 1."""
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise HypenetError(f"{owner} has token id {outside[0]}; the vocabulary of the model is 0 to {vocab_size - 1}")


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of the prompts in batches of at most `batch_size`, similar lengths together, the longest first.

    Longest first, so that a lack of memory shows at once and the incomplete batch is the cheapest one.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def padded_rows(count: int, batch_size: int) -> int:
    """Rows of a batch that holds `count` prompts: the next power of two, at most `batch_size`."""
    return min(batch_size, 1 << (count - 1).bit_length())


def cache_size(tokens: int) -> int:
    """Slots for `tokens` tokens: a multiple of 256 or of a quarter of the power of two below, whichever is larger.

    Four sizes an octave bound both the compilations and the idle memory (a quarter at most, from 1024 slots on).
    """
    step = max(256, (1 << (tokens.bit_length() - 1)) // 4)
    return -(-tokens // step) * step


def pad_right(prompts: Sequence[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [rows, T], valid bool [rows, T]) of at most `rows` prompts; rows past the prompts are invalid."""
    width = max(len(prompt) for prompt in prompts)
    tokens_BT, valid_BT = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
        valid_BT[row, : len(prompt)] = True
    return tokens_BT, valid_BT


def align_left(tokens_BT: np.ndarray, valid_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move every row's valid tokens to its start, in order, and cut the columns that then hold padding alone."""
    order = np.argsort(~valid_BT, axis=1, kind="stable")
    width = max(1, int(valid_BT.sum(axis=1).max(initial=0)))
    valid_BT = np.take_along_axis(valid_BT, order, axis=1)[:, :width]
    return np.where(valid_BT, np.take_along_axis(tokens_BT, order, axis=1)[:, :width], 0), valid_BT
