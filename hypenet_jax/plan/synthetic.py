"""Text for measurements: documents of random words, one word a token, packed and read by the data pipeline itself."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from hypenet_jax.data.packing import PackedTokens, pack
from hypenet_jax.data.sources import Document
from hypenet_jax.data.tokenizers import Tokenizer

SOURCE = "random words"


def random_pack(directory: pathlib.Path, vocabulary: int, row: int, mean: int | None, tokens: int) -> PackedTokens:
    """About `tokens` random tokens over the whole vocabulary, packed into `directory`.

    row: tokens a row of the batches to come. mean: tokens a document on average, their lengths exponentially
    distributed; None makes every row one document, its end-of-document token included.
    """
    rng = np.random.default_rng(0)
    lengths = _whole_rows(row, tokens) if mean is None else _lengths(rng, mean, tokens)
    tokenizer = word_tokenizer(vocabulary)
    pack(_documents(rng, lengths, vocabulary), tokenizer, directory, seed=0)
    return PackedTokens(directory, tokenizer)


def word_tokenizer(vocabulary: int) -> Tokenizer:
    """Its words are the numbers from 0 to vocabulary - 1, each its own id; the last one ends a document."""
    contents: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {str(i): i for i in range(vocabulary)}, "unk_token": "0"},
    }
    return Tokenizer(json=json.dumps(contents), eos_id=vocabulary - 1, pad_id=vocabulary - 1)


def mean_span(segment_ids: list[np.ndarray]) -> float:
    """Tokens of the document that a token lies in, within its row, averaged over the tokens of some batches [B, T]."""
    squares = total = 0
    for row in (row for ids_BT in segment_ids for row in ids_BT):
        counts = np.unique(row[row >= 0], return_counts=True)[1].astype(np.int64)
        squares, total = squares + int((counts**2).sum()), total + int(counts.sum())
    return squares / max(1, total)


def _whole_rows(row: int, tokens: int) -> list[int]:
    return [row] * max(1, tokens // row)


def _lengths(rng: np.random.Generator, mean: int, tokens: int) -> list[int]:
    count = max(2, tokens // mean)
    return [int(length) for length in np.maximum(2, rng.exponential(mean, count))]


def _documents(rng: np.random.Generator, lengths: list[int], vocabulary: int) -> Iterator[Document]:
    for length in lengths:
        words = rng.integers(0, vocabulary - 1, length - 1)
        yield Document(SOURCE, " ".join(map(str, words.tolist())))
