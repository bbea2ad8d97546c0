"""Measure the cases, a line of the table as each is done."""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import Any

import jax

from kernels_pallas.bench import peers
from kernels_pallas.bench.cases import KERNELS, LIGHTNING_SHAPES, WIDTH, Case, cases
from kernels_pallas.bench.ceilings import Ceilings, ceilings
from kernels_pallas.bench.timing import milliseconds
from kernels_pallas.dispatch import Refused

PACKAGES = (
    "jax",
    "jaxlib",
    "torch",
    "triton",
    "flash-linear-attention",
    "jax-linear-attention",
    "jax-triton",
    "tokamax",
)
PEERS = ("fla", "jax-linear-attention", "tokamax")


def bench(kernels: tuple[str, ...] = KERNELS, small: bool | None = None, say: Callable[[str], None] = print) -> dict:
    """Measure every implementation of the named kernels on the default device.

    Args:
      kernels: some of `KERNELS`.
      small: small shapes, in seconds; None on a CPU only.
      say: gets each line of the table.

    Returns:
      {"device", "versions", "ceilings", "rows"}, all JSON; a row has kernel, shape, implementation and either
      milliseconds, share (of the ceiling that bounds its work) and temporary_bytes, or "refused", why it has none.

    Raises:
      ValueError: a kernel is unknown.
    """
    unknown = [kernel for kernel in kernels if kernel not in KERNELS]
    if unknown:
        raise ValueError(f"there is no kernel {unknown[0]!r} to measure; known: {', '.join(KERNELS)}")
    # fla's process comes first and needs the device's memory, most of which JAX would take when it starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    small = jax.default_backend() == "cpu" if small is None else small
    times = peers.fla(LIGHTNING_SHAPES if "lightning" in kernels and not small else [], WIDTH)
    top = ceilings(small)
    device = jax.devices()[0].device_kind
    say(f"{device}: copy {top.copy / 1e12:.2f} TB/s, bfloat16 product {top.matmul / 1e12:.1f} TFLOP/s")
    say(HEADER)
    rows = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = [(case, _compiled(case, pool)) for case in cases(kernels, small)]
        # XLA tunes on the device while it compiles: nothing is timed before that is over.
        wait([future for _, functions in compiled for future in functions.values()])
    for case, functions in compiled:
        measured = _measure(case, functions, times, top)
        rows += measured
        for line in _lines(measured):
            say(line)
    return {
        "device": device,
        "versions": {name: _version(name) for name in PACKAGES if _version(name)},
        "ceilings": {"copy_bytes_per_second": top.copy, "bfloat16_flop_per_second": top.matmul},
        "rows": rows,
    }


HEADER = f"{'kernel':<24}{'shape':<34}{'implementation':<26}{'ms':>9}{'of ceiling':>12}{'temporaries':>13}  over peers"


def _compiled(case: Case, pool: Executor) -> dict[str, Future]:
    inputs = jax.eval_shape(case.inputs)
    return {
        name: pool.submit(lambda function: jax.jit(function).lower(*inputs).compile(), function)
        for name, function in case.implementations.items()
    }


def _measure(
    case: Case, functions: dict[str, Future], fla: dict[str, float | str], top: Ceilings
) -> list[dict[str, Any]]:
    about = {"kernel": case.kernel, "shape": case.shape}
    inputs = case.inputs()
    rows: list[dict[str, Any]] = []
    for name, future in functions.items():
        try:
            function = future.result()
            memory = function.memory_analysis()
            measured: dict[str, Any] = {
                "milliseconds": milliseconds(function, *inputs),
                "temporary_bytes": memory.temp_size_in_bytes if memory else None,
            }
        except Refused as refusal:
            measured = {"refused": str(refusal).split("call: ")[-1]}
        except Exception as error:  # of a peer's, or of the machine: it is a line of the table, and the others go on
            measured = {"refused": f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"}
        rows.append({**about, "implementation": name, **measured})
    if (of_fla := fla.get(f"{case.kernel} {case.shape}")) is not None:
        outcome = "refused" if isinstance(of_fla, str) else "milliseconds"
        rows.append({**about, "implementation": "fla", outcome: of_fla})
    at_best = 1e3 * (case.bytes / top.copy if case.bytes else case.flops / top.matmul)
    for row in rows:
        if "milliseconds" in row and at_best:
            row["share"] = at_best / row["milliseconds"]
    return rows


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    peers = {
        row["implementation"]: row["milliseconds"]
        for row in rows
        if row["implementation"] in PEERS and "milliseconds" in row
    }
    return [_line(row, peers) for row in rows]


def _line(row: dict[str, Any], peers: dict[str, float]) -> str:
    start = f"{row['kernel']:<24}{row['shape']:<34}{row['implementation']:<26}"
    if "refused" in row:
        return start + "  " + row["refused"]
    share = f"{row['share']:>12.0%}" if math.isfinite(row.get("share", math.nan)) else f"{'':>12}"
    temporaries = (
        f"{row['temporary_bytes'] / 2**20:>9.0f} MiB" if row.get("temporary_bytes") is not None else f"{'':>13}"
    )
    over = ", ".join(
        f"{time / row['milliseconds']:.2f}x {name}" for name, time in peers.items() if name != row["implementation"]
    )
    return f"{start}{row['milliseconds']:>9.3f}{share}{temporaries}  {over}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
