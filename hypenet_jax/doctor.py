"""`hypenet doctor`: what is installed, what it runs on, and whether every kernel backend computes what it should."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable

import jax

from kernels_pallas.selfcheck import selfcheck

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
    say(f"{'kernel':<22}{'backend':<12}{'check':<28}{'error':>10}{'tolerance':>11}")
    for row in rows:
        mark = "" if row.ok else "  FAILED"
        say(f"{row.kernel:<22}{row.backend:<12}{row.check:<28}{row.error:>10.1e}{row.tolerance:>11.0e}{mark}")
    return all(row.ok for row in rows)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"
