"""Perplexity over windows of text, whole and by position."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.token_nll import bind, padded_rows
from hypenet_jax.parallel.processes import on_host

Windows = np.ndarray | Iterable[Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class WindowLoss:
    """Loss summed over windows, by position within the document.

    nll_T float64 [T]: summed negative log-likelihood in nats; count_T int64 [T]: tokens summed.
    """

    nll_T: np.ndarray
    count_T: np.ndarray

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return float(self.nll_T.sum() / self.count_T.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(self.nll)

    def by_position(self, first_edge: int = 64) -> list[dict]:
        """[{"start", "stop", "nll"}]: mean nll of positions start <= p < stop; edges 0, first_edge, then doubling.

        The last bucket stops at the window's length; buckets without tokens are left out.
        """
        if first_edge < 1:
            raise HypenetError(f"first_edge is {first_edge}; give at least 1 position")
        length, rows = len(self.nll_T), []
        start, stop = 0, first_edge
        while start < length:
            stop = min(stop, length)
            count = int(self.count_T[start:stop].sum())
            if count:
                rows.append({"start": start, "stop": stop, "nll": float(self.nll_T[start:stop].sum() / count)})
            start, stop = stop, 2 * stop
        return rows


def window_loss(model: Any, params: Any, windows: Windows, batch_size: int, *, token_chunk: int = 2048) -> WindowLoss:
    """One pass over the windows; everything else here derives from its result.

    windows: int [N, T+1] (an array or a memmap, read batch by batch), every token predicting the next, negative
      tokens being padding; or an iterable
      of the data pipeline's batch dicts, of which `loss_mask` says which targets count and `segment_ids` keep
      documents apart. All batches have one shape, the last array batch is filled with padding: one compilation.
    model: a LanguageModel, or a TokenNll function (then params is ignored).
    Raises HypenetError for windows that hold no target.
    """
    nll_fn = bind(model, params, token_chunk)
    nll_T, count_T = np.zeros(0), np.zeros(0, np.int64)
    for batch in _batches(windows, batch_size):
        segments_BT, mask_BT = batch["segment_ids"], np.asarray(batch["loss_mask"]) & (batch["segment_ids"] >= 0)
        nll_BT, _ = nll_fn(batch["tokens"], batch["targets"], segments_BT)
        positions_BT = _positions(segments_BT)
        length = positions_BT.shape[1]
        if length > len(nll_T):
            nll_T = np.pad(nll_T, (0, length - len(nll_T)))
            count_T = np.pad(count_T, (0, length - len(count_T)))
        np.add.at(nll_T, positions_BT[mask_BT], on_host(nll_BT).astype(np.float64)[mask_BT])
        np.add.at(count_T, positions_BT[mask_BT], 1)
    if not count_T.sum():
        raise HypenetError("the windows hold no token to predict; give at least one window of 2 tokens")
    used = np.flatnonzero(count_T)[-1] + 1  # rows may be longer than the documents in them
    return WindowLoss(nll_T[:used], count_T[:used])


def perplexity(model: Any, params: Any, windows: Windows, batch_size: int) -> float:
    """exp of the mean negative log-likelihood of a token; see `window_loss`."""
    return window_loss(model, params, windows, batch_size).perplexity


def by_position(
    model: Any, params: Any, windows: Windows, batch_size: int, first_edge: int = 64
) -> list[dict[str, float]]:
    """Mean nll in buckets of position whose edges double; see `WindowLoss.by_position`."""
    return window_loss(model, params, windows, batch_size).by_position(first_edge)


def _batches(windows: Windows, batch_size: int) -> Iterator[Mapping[str, np.ndarray]]:
    if not isinstance(windows, np.ndarray):
        yield from windows
        return
    if windows.ndim != 2 or windows.shape[1] < 2:
        raise HypenetError(f"windows have shape {windows.shape}; give [windows, tokens + 1] of at least 2 tokens")
    if batch_size < 1:
        raise HypenetError(f"batch_size is {batch_size}; give at least 1")
    for start in range(0, len(windows), batch_size):
        rows = padded_rows(np.asarray(windows[start : start + batch_size]).astype(np.int32), 0, batch_size, fill=-1)
        segments_BT = np.where(rows[:, :-1] < 0, -1, 0).astype(np.int32)
        mask_BT = (segments_BT >= 0) & (rows[:, 1:] >= 0)
        rows = np.maximum(rows, 0)
        yield {
            "tokens": rows[:, :-1],
            "targets": rows[:, 1:],
            "segment_ids": segments_BT,
            "loss_mask": mask_BT,
        }


def _positions(segments_BT: np.ndarray) -> np.ndarray:
    """The position of each token within its document's part of the row; padding does not count."""
    positions_BT = np.zeros(segments_BT.shape, np.int64)
    for row, segments_T in enumerate(np.asarray(segments_BT)):
        real = np.flatnonzero(segments_T >= 0)
        ids = segments_T[real]
        begins = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1)) if len(ids) else real
        positions_BT[row, real] = np.arange(len(real)) - np.repeat(begins, np.diff(np.append(begins, len(real))))
    return positions_BT
