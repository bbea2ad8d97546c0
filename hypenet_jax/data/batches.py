"""The batches of a training stage: a range of the packed stream, cut into rows and shuffled; and long documents.

A stage reads the tokens [start_token, stop_token) of the endless stream, each exactly once, and the next stage goes on
from stop_token. Which rows a step holds follows from the seed and the step alone, so that a position is one number.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import absl.flags
import grain
import numpy as np

from hypenet_jax.data.packing import PackedTokens
from hypenet_jax.data.teacher_rows import TeacherRows
from hypenet_jax.errors import HypenetError

# Batches made ahead of the training step, and the threads that make them.
_AHEAD = 4
_THREADS = 2
# Read at a time where a range is looked through.
_SCAN_TOKENS = 1 << 16


def document_windows(
    documents: PackedTokens | Iterable[np.ndarray | Sequence[int]], length: int, count: int
) -> np.ndarray:
    """int32 [n, length + 1]: the beginnings of the first documents with at least `length` + 1 tokens, n <= count.

    documents: packed tokens (a document's last token is its end-of-document id), or arrays of token ids. The first
    `length` tokens of a row are inputs, the last `length` their targets.
    """
    if length < 1 or count < 1:
        raise HypenetError(f"document windows have length {length} and count {count}; both must be at least 1")
    rows = documents.documents() if isinstance(documents, PackedTokens) else map(np.asarray, documents)
    long = (row[: length + 1] for row in rows if len(row) > length)
    return np.array(list(itertools.islice(long, count)), np.int32).reshape(-1, length + 1)


def batch_of(
    tokens_BS: np.ndarray, starts_BS: np.ndarray, prompts_BS: np.ndarray | None = None, joined: bool = False
) -> dict[str, np.ndarray]:
    """The batch of rows with one token of lookahead, S = T + 1.

    tokens_BS int32 [B, T+1], starts_BS bool [B, T+1] (True at a document's first token), prompts_BS bool [B, T+1] (True
    at tokens that are not to be learned) -> "tokens", "targets", "segment_ids" int32 [B, T] (documents counted from 0
    within the row) and "loss_mask" bool [B, T] (True where the target is of the token's document and of no prompt).
    joined: a row is one document, whatever begins in it.
    """
    if joined:
        starts_BS = np.zeros_like(starts_BS)
    documents_BS = np.cumsum(starts_BS, axis=1, dtype=np.int32)
    unlearned_BS = starts_BS if prompts_BS is None else starts_BS | prompts_BS
    return {
        "tokens": np.ascontiguousarray(tokens_BS[:, :-1]),
        "targets": np.ascontiguousarray(tokens_BS[:, 1:]),
        "segment_ids": documents_BS[:, :-1] - documents_BS[:, :1],
        "loss_mask": ~unlearned_BS[:, 1:],
    }


def _end_with_the_parent(_worker: int, _workers: int) -> None:
    """In a process that reads ahead: one that was killed, or left at once, cannot end it, and it would stay."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclasses.dataclass(frozen=True)
class _ReadRows:
    """Maps the row numbers of a global batch to the rows that this process reads of it."""

    packed: PackedTokens
    seq_len: int
    start_token: int
    own: tuple[int, ...]
    completions: bool
    beside: TeacherRows | None
    joined: bool

    def __call__(self, rows_B: np.ndarray) -> dict[str, np.ndarray]:
        rows_B = rows_B[list(self.own)].astype(np.int64)
        starts_B = self.start_token + rows_B * self.seq_len
        tokens_BS, starts_BS, prompts_BS = self.packed.rows_with_prompts(starts_B, self.seq_len + 1)
        batch = batch_of(tokens_BS, starts_BS, prompts_BS if self.completions else None, self.joined)
        return batch if self.beside is None else batch | self.beside(rows_B)


class StageBatches(Iterator[dict[str, np.ndarray]]):
    """`steps` batches (see `batch_of`) of this process's rows; an iterator whose position can be saved and set.

    The range is cut into steps * batch_size rows of `seq_len` tokens, shuffled by `seed`. batch_size counts the rows
    of all processes; `rows` are the places in every global batch that this one yields, in ascending order (None: all):
    what a step holds does not depend on who reads which part of it. workers: processes that read ahead; 0 reads in
    threads. completions: of conversations only what the assistant wrote is in the loss mask; plain text is whole.
    beside: a teacher's output for these rows, whose arrays the batches carry too. joined: see `batch_of`.
    Raises HypenetError for arguments out of range.
    """

    def __init__(
        self,
        packed: PackedTokens,
        *,
        seq_len: int,
        batch_size: int,
        start_token: int,
        steps: int,
        seed: int,
        rows: Sequence[int] | None = None,
        workers: int = 0,
        completions: bool = False,
        beside: TeacherRows | None = None,
        joined: bool = False,
    ):
        for name, value, lowest in (
            ("seq_len", seq_len, 1),
            ("batch_size", batch_size, 1),
            ("start_token", start_token, 0),
            ("steps", steps, 1),
            ("seed", seed, 0),
            ("workers", workers, 0),
        ):
            if value < lowest:
                raise HypenetError(f"{name} is {value}; it must be at least {lowest}")
        # The bound of grain's shuffle.
        for name, value in (("seed", seed), ("steps * batch_size", steps * batch_size)):
            if value >= 1 << 32:
                raise HypenetError(f"{name} is {value}; it must be below 2**32")
        rows = tuple(range(batch_size) if rows is None else rows)
        if not rows or list(rows) != sorted(set(rows)) or not 0 <= rows[0] <= rows[-1] < batch_size:
            raise HypenetError(
                f"rows are {list(rows)}; give places 0..{batch_size - 1} of the batch in ascending order"
            )
        self.packed, self.steps, self.workers = packed, steps, workers
        self.stop_token = start_token + steps * batch_size * seq_len
        self._stream = {
            "data": packed.fingerprint,
            "seq_len": seq_len,
            "batch_size": batch_size,
            "start_token": start_token,
            "steps": steps,
            "seed": seed,
            "workers": workers,
            # Left out where it is not: positions from before there were conversations have no such entry.
            **({"completions": True} if completions else {}),
            **({"joined": True} if joined else {}),
        }
        # Kept hidden states are the teacher itself; the likeliest tokens make another loss.
        if beside is not None and beside.output.form != "hidden":
            self._stream["teacher"] = f"{beside.output.form} of {beside.output.width}"
        self._reader = _ReadRows(packed, seq_len, start_token, rows, completions, beside, joined)
        self._dataset = (
            grain.MapDataset.range(steps * batch_size).shuffle(seed=seed).batch(batch_size).map(self._reader)
        )
        self._step = 0
        self._running: grain.DatasetIterator | None = None

    def __len__(self) -> int:
        return self.steps

    def __next__(self) -> dict[str, np.ndarray]:
        if self._step >= self.steps:
            self.close()
            raise StopIteration
        if self._running is None:
            self._running = self._start()
        batch = next(self._running)
        self._step += 1
        return batch

    def learns(self) -> bool:
        """Whether the loss mask holds any token of the whole range; what comes after the first one is not read."""
        reader = self._reader
        # After once around the stream nothing new comes.
        stop = min(self.stop_token, reader.start_token + len(self.packed))
        for start in range(reader.start_token, stop, _SCAN_TOKENS):
            tokens, starts, prompts = self.packed.rows_with_prompts(
                np.array([start]), min(_SCAN_TOKENS, stop - start) + 1
            )
            if batch_of(tokens, starts, prompts if reader.completions else None, reader.joined)["loss_mask"].any():
                return True
        return False

    def get_state(self) -> dict[str, Any]:
        """The position and what identifies the stream, JSON-able; the same in every process."""
        return {"step": self._step, "stream": dict(self._stream)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was taken, at once and in any number of processes.

        Raises HypenetError where the state is of another stream or was taken with another number of workers.
        """
        stream = state["stream"]
        for name in dict.fromkeys((*self._stream, *stream)):
            value = self._stream.get(name)
            if stream.get(name) != value:
                raise HypenetError(
                    f"the saved data position has {name} {stream.get(name)!r} but this run has {value!r}; "
                    "resume with the same, or start anew"
                )
        if not 0 <= state["step"] <= self.steps:
            raise HypenetError(f"the saved data position is step {state['step']} of {self.steps}; it is damaged")
        self.close()
        self._step = state["step"]

    def close(self) -> None:
        """Ends the threads or processes that read ahead; the next batch starts them again."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _start(self) -> grain.DatasetIterator:
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
        ahead = self._dataset[self._step :].to_iter_dataset(options)
        if self.workers:
            # grain's processes read absl's flags, which nobody has parsed outside an absl program.
            if not absl.flags.FLAGS.is_parsed():
                absl.flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=2)
            ahead = ahead.mp_prefetch(processes, worker_init_fn=_end_with_the_parent)
        return iter(ahead)
