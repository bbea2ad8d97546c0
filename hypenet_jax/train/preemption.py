"""SIGTERM as a polite request: finish the update, save, leave; where nothing is being trained, leave at once."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

# The exit code of a run that was asked to stop, saved its state and can be started again: EX_TEMPFAIL of sysexits.h.
EXIT_PREEMPTED = 75

# jax.distributed stops at the call after the latest that any process has made, so calls are counted over all stages.
_calls = itertools.count(1)


class Preemption:
    """A context in which SIGTERM is remembered instead of ending the process.

    Several processes must stop at the same step, so there the decision is jax.distributed's, which listens to the
    signal itself. Outside the main thread Python allows no handlers, and the signal keeps its meaning. A signal that
    came too late for `requested` is given to the handler of before when the context ends.
    """

    def __init__(self) -> None:
        self._signalled = threading.Event()
        self._heeded = False
        self._previous: object = None
        self._installed = False

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._signalled.set()

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._remember)
            self._installed = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        if not self._installed:
            return
        _restore(self._previous)
        self._installed = False
        if self._signalled.is_set() and not self._heeded and kind is None:
            signal.raise_signal(signal.SIGTERM)

    def requested(self) -> bool:
        """True when the run should save and stop now; called once a step, the same answer on every process."""
        if jax.process_count() > 1:
            return _all_asked()
        self._heeded = self._signalled.is_set()
        return self._heeded


@contextlib.contextmanager
def ends_at_sigterm() -> Iterator[None]:
    """SIGTERM ends the body with EXIT_PREEMPTED, cleaning up behind it; within a `Preemption` it is remembered.

    jax.distributed listens to the signal itself, once the processes have joined: see `stop_if_asked`.
    """
    if threading.current_thread() is not threading.main_thread() or jax.distributed.is_initialized():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        if not jax.distributed.is_initialized():
            _restore(previous)


def _restore(previous: object) -> None:
    # None: the handler before ours was not Python's; the default is the nearest thing that can be restored.
    signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)  # type: ignore[arg-type]


def _leave(_number: int, _frame: FrameType | None) -> None:
    # What is cleaned up now is not to be interrupted by a second one.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Not print: the signal may have come in the middle of one.
    os.write(2, b"hypenet: stopped by SIGTERM; the same command continues\n")
    raise SystemExit(EXIT_PREEMPTED)


def stop_if_asked(say: Callable[[str], None], where: str) -> None:
    """With several processes, ends all of them with EXIT_PREEMPTED here if one has got SIGTERM; all have to call it.

    One process alone need not ask: `ends_at_sigterm` ends it where it is.
    """
    if jax.process_count() > 1 and _all_asked():
        say(f"{where}: stopped; the same command continues")
        raise SystemExit(EXIT_PREEMPTED)


def _all_asked() -> bool:
    return multihost_utils.reached_preemption_sync_point(next(_calls))
