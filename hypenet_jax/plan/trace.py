"""Where a device's time goes, out of a trace of JAX's profiler."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

from jax.profiler import ProfileData

from hypenet_jax.plan.collectives import KINDS

# Collectives by the names of XLA's operations, of NCCL's kernels, and of collectives within a `shard_map` on a CPU.
_NAMES = (*KINDS, "nccl", "psum", "ppermute", "all_gather", "reduce_scatter", "all_to_all", "collective-broadcast")


def busy_seconds(directory: str, devices: int) -> tuple[float, float]:
    """(compute, collectives): seconds that a device spends in operations of either kind, mean over devices.

    devices: of this process, whose trace it is.

    Collectives include the time that a device waits in them for the others. Where a device works on both at once, both
    count, so that the sum may exceed the time that has passed. (0, 0) where the trace names no operations.
    """
    compute = collective = 0.0
    for file in pathlib.Path(directory).rglob("*.xplane.pb"):
        for line in _lines(ProfileData.from_file(str(file))):
            events = list(_operations(line))
            sending = _covered([(a, b) for a, b, name in events if _is_collective(name)])
            collective += sending
            compute += _covered([(a, b) for a, b, _ in events]) - sending
    return compute / devices / 1e9, collective / devices / 1e9


def _lines(data: Any) -> Iterator[Any]:
    """Those of accelerators, if there are any: the host's threads then name the operations that they hand over."""
    planes = list(data.planes)
    accelerators = [plane for plane in planes if plane.name.startswith("/device:") and any(plane.lines)]
    for plane in accelerators or planes:
        yield from plane.lines


def _operations(line: Any) -> Iterator[tuple[float, float, str]]:
    """(start, end, name) of the events that are operations of a compiled program, in nanoseconds."""
    for event in line.events:
        name = event.name if line.name == "XLA Ops" else dict(event.stats).get("hlo_op")
        if name is not None:
            yield event.start_ns, event.start_ns + event.duration_ns, f"{name} {event.name}"


def _is_collective(name: str) -> bool:
    return any(word in name.lower() for word in _NAMES)


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union: an operation may lie within another, a loop's body within the loop."""
    total, end = 0.0, 0.0
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
