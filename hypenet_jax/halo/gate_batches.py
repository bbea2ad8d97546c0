"""The batches of the gate search: rows of retrieval documents beside rows of training text."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from hypenet_jax.data.batches import StageBatches
from hypenet_jax.data.packing import PackedTokens, pack
from hypenet_jax.data.sources import read_documents
from hypenet_jax.data.tokenizers import Tokenizer
from hypenet_jax.halo.settings import GateSearchConfig
from hypenet_jax.parallel.processes import first, own_rows
from hypenet_jax.parallel.rules import batch_sharding


def packed_retrieval(settings: GateSearchConfig, tokenizer: Tokenizer, directory: pathlib.Path) -> PackedTokens:
    """The retrieval source of the search, packed into `directory` on the first call."""
    source = settings.retrieval
    first(lambda: pack(read_documents(source), tokenizer, directory, seed=0, sources=(source,)))
    return PackedTokens(directory, tokenizer)


def retrieval_rows(settings: GateSearchConfig) -> int:
    """How many of a batch's rows are retrieval documents: at least one."""
    return max(1, round(settings.retrieval_share * settings.batch_size))


class GateBatches(Iterator[dict[str, np.ndarray]]):
    """Batches of `data.batches.batch_of` with two more arrays, float32 [B, T]: "progress", the share of the steps done
    with this one, and "uniform", random numbers in [0, 1).

    The first rows of a batch are retrieval documents, read from their first token on, the others training text from
    `start_token` on. Position and order are those of two `StageBatches`.
    """

    def __init__(
        self,
        retrieval: PackedTokens,
        text: PackedTokens,
        settings: GateSearchConfig,
        start_token: int,
        seed: int,
        mesh: Mesh,
        workers: int = 0,
    ):
        own = own_rows(batch_sharding(mesh), settings.batch_size, settings.seq_len)
        rows = retrieval_rows(settings)
        # (tokens, rows of the whole batch, those of them that this process reads, first token)
        parts = (
            (retrieval, rows, [row for row in own if row < rows], 0),
            (text, settings.batch_size - rows, [row - rows for row in own if row >= rows], start_token),
        )
        self._shape, self._whole = (len(own), settings.seq_len), (settings.batch_size, settings.seq_len)
        self._own, self._seed, self._steps, self._step = own, seed, settings.steps, 0
        # A part of which this process reads no row is there for its position alone.
        self._parts = [
            StageBatches(
                packed,
                seq_len=settings.seq_len,
                batch_size=size,
                start_token=start,
                steps=settings.steps,
                seed=seed,
                rows=mine or None,
                workers=workers,
            )
            for packed, size, mine, start in parts
            if size
        ]
        self._read = [part for part, (_, _, mine, _) in zip(self._parts, parts, strict=False) if mine]

    def __next__(self) -> dict[str, np.ndarray]:
        found = [next(part) for part in self._read]
        self._step += 1
        batch = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        progress = np.full(self._shape, self._step / self._steps, np.float32)
        # Every process draws the whole batch's numbers and takes its rows'.
        uniform = np.random.default_rng((self._seed, self._step)).random(self._whole, np.float32)[self._own]
        return batch | {"progress": progress, "uniform": uniform}

    def get_state(self) -> dict[str, Any]:
        """The position of each part, JSON-able; the same in every process."""
        return {"parts": [part.get_state() | {"step": self._step} for part in self._parts]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was taken; HypenetError where it is of other streams."""
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.set_state(saved)
            self._step = saved["step"]

    def close(self) -> None:
        """Ends the threads that read ahead."""
        for part in self._parts:
            part.close()
