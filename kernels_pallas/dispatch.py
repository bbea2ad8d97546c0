"""Pick the backend of a kernel: the one asked for by name, else the best that supports the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Backend:
    """One implementation of a kernel.

    `refuses` takes the keyword arguments of the call and returns None where `function` supports it, else the reason.
    """

    name: str
    function: Callable[..., Any]
    refuses: Callable[..., str | None]


class Refused(ValueError):
    """No backend, or not the one asked for, supports the call."""


def table(*backends: Backend) -> dict[str, Backend]:
    """Backends by name, best first: "auto" tries them in this order."""
    return {backend.name: backend for backend in backends}


def choose(kernel: str, backends: Mapping[str, Backend], requested: str, call: Mapping[str, Any]) -> Backend:
    """The backend for a call.

    Args:
      kernel: the kernel's name, for error messages.
      backends: by name, best first.
      requested: a name, or "auto" for the first backend that does not refuse the call.
      call: the keyword arguments that `Backend.refuses` judges (arrays, tracers or shape structs, and options).

    Raises:
      Refused: the named backend (with "auto": every backend) refuses the call; a ValueError that says why.
      ValueError: the name is unknown.
    """
    if requested == "auto":
        reasons = []
        for backend in backends.values():
            reason = backend.refuses(**call)
            if reason is None:
                return backend
            reasons.append(f"{backend.name}: {reason}")
        raise Refused(f"no backend of {kernel} supports this call ({'; '.join(reasons)})")
    if requested not in backends:
        raise ValueError(f"{kernel} has no backend {requested!r}; known: auto, {', '.join(backends)}")
    reason = backends[requested].refuses(**call)
    if reason is not None:
        raise Refused(f"backend {requested!r} of {kernel} refuses this call: {reason}")
    return backends[requested]
