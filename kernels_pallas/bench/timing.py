"""Time of a compiled function on the default device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

ROUNDS = 5
ROUND_SECONDS = 0.05
MAX_CALLS = 50


def milliseconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Milliseconds a call of a compiled `function`: the median of `ROUNDS` rounds, after a warm-up.

    A round is several calls, handed over without waiting, so that the host's share of a call is hidden behind the
    device's work; a function shorter than the host's share is measured as long as that.
    """
    jax.block_until_ready(function(*arguments))
    calls = max(1, min(MAX_CALLS, round(ROUND_SECONDS / max(_round(function, arguments, 1), 1e-6))))
    return 1e3 * statistics.median(_round(function, arguments, calls) for _ in range(ROUNDS))


def _round(function: Callable[..., Any], arguments: tuple, calls: int) -> float:
    start = time.perf_counter()
    before = None
    for _ in range(calls):
        result = function(*arguments)
        # Never more than two calls ahead of the device: each holds its results in the device's memory.
        jax.block_until_ready(before)
        before = result
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls
