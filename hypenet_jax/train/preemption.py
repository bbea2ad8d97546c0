"""SIGTERM as a polite request: finish the update, save, leave."""

from __future__ import annotations

import itertools
import signal
import threading
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
    signal itself. Outside the main thread Python allows no handlers, and the signal keeps its meaning.
    """

    def __init__(self) -> None:
        self._signalled = threading.Event()
        self._previous: object = None
        self._installed = False

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._signalled.set()

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._remember)
            self._installed = True
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._installed:
            # None: the handler before ours was not Python's; the default is the nearest thing that can be restored.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)  # type: ignore[arg-type]
            self._installed = False

    def requested(self) -> bool:
        """True when the run should save and stop now; called once a step, the same answer on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(next(_calls))
        return self._signalled.is_set()
