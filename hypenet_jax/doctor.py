"""`hypenet doctor`: what is installed, what it runs on, and whether every kernel backend computes what it should."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import platform
from collections.abc import Callable

import jax

from kernels_pallas.selfcheck import Row, selfcheck

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "safetensors", "gguf")


def examine(say: Callable[[str], None]) -> bool:
    """Print versions, devices and the kernels' self-check; False when a check fails."""
    from hypenet_jax import __version__

    say(f"hypenet_jax {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    say(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    for device in jax.devices():
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        say(f"device {device.id}: {device.device_kind}" + (f", {limit / 2**30:.1f} GiB" if limit else ""))
    rows = selfcheck()
    say("kernels against their references, the worst of outputs and gradients (error / tolerance):")
    for (kernel, backend), group in itertools.groupby(rows, lambda row: (row.kernel, row.backend)):
        say(f"{kernel:<22}{backend:<12}{_verdict(list(group))}")
    return all(row.ok for row in rows)


def _verdict(rows: list[Row]) -> str:
    """What the checks of one backend of one kernel come to."""
    failed = [row for row in rows if not row.ok]
    if failed:
        return "FAILED  " + "; ".join(f"{row.check} {row.error:.1e} / {row.tolerance:.0e}" for row in failed)
    refused = {row.check.partition(": ")[2] for row in rows if math.isnan(row.error)}
    ran = [row for row in rows if not math.isnan(row.error)]
    if not ran:
        return f"not here: {'; '.join(sorted(refused))}"
    dtypes = list(dict.fromkeys(row.check.partition(": ")[0] for row in ran))
    worst = [
        max((row for row in ran if row.check.startswith(d)), key=lambda row: row.error / row.tolerance) for d in dtypes
    ]
    told = [f"{row.check} {row.error:.1e} / {row.tolerance:.0e}" for row in worst]
    return "ok  " + "; ".join([*told, *sorted(refused)])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
