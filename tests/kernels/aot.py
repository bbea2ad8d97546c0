"""Compile kernels for TPUs and an H100 on a machine that has neither, in one subprocess for each compiler.

A test lists `Case`s and calls `compile_all`. A case's function is named "module:function" (a module of this directory
or an installed one); called with the case's arguments it gives (function, list of jax.ShapeDtypeStruct), or
(function, list, list of argument numbers) where those arguments, and the results, may have any memory layout, as they
may inside a larger program. Arguments that say their own sharding are compiled for those devices, and as they are.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
# Where `make aot` puts the compilers; an environment may also have them among its packages.
APART = pathlib.Path(sys.prefix) / "aot"
SECONDS_A_CASE = 120
# Processor seconds of `yardstick` where a compilation takes what the tests' bounds were chosen for. It was 0.84 where
# Lightning with documents and its backward at 524,288 tokens took 12.7 s on v5p, which had been 6.4 s: a processor that
# others share may take twice as long for the same instructions.
YARDSTICK = 0.42


class Case(NamedTuple):
    name: str
    target: str  # "v5e", "v5p", "v6e" or "h100"
    function: str
    arguments: dict[str, Any] = {}
    schedule: bool = False  # TPU: count the instruction bundles of the kernels, by loop depth


class Compiled(NamedTuple):
    """What a compilation gave; `error` is its message where it failed."""

    name: str
    error: str = ""
    seconds: float = 0.0  # of tracing and compiling: processor time, over `slowness`
    temp_bytes: int = 0
    bytes_accessed: float = 0.0  # of memory, by XLA's count; a kernel's are what its CostEstimate says
    bundles: dict[str, dict[str, int]] = {}  # kernel -> loop depth -> instruction bundles
    registers: dict[str, int] = {}  # H100: kernel -> registers a thread; the most, of several kernels of one name
    spilled: dict[str, int] = {}  # H100: kernel -> bytes of stores to memory for want of registers


def missing(target: str) -> str | None:
    """What is not installed that compiling for `target` needs."""
    package = "jax_cuda13_plugin" if target == "h100" else "libtpu"
    if (APART / package).is_dir() or importlib.util.find_spec(package):
        return None
    return f"{package} is not installed (make aot)"


def compile_all(cases: list[Case]) -> dict[str, Compiled]:
    """The cases' results by name. Skips the test where a compiler is not installed."""
    import pytest

    results: dict[str, Compiled] = {}
    for schedule in (False, True):
        for gpu in (False, True):
            chosen = [c for c in cases if (c.target == "h100") == gpu and c.schedule == schedule]
            if chosen and (reason := missing(chosen[0].target)):
                pytest.skip(reason)
            results |= _subprocess(chosen) if chosen else {}
    return results


def failures(results: dict[str, Compiled], seconds: float, temp_bytes: int) -> list[str]:
    """Sentences on the cases that did not compile, or not within so much time and temporary memory."""
    said = []
    for r in results.values():
        if r.error:
            said.append(f"{r.name}: {r.error}")
        if r.seconds > seconds:
            said.append(f"{r.name} took {r.seconds:.1f} s, more than {seconds}")
        if r.temp_bytes > temp_bytes:
            said.append(f"{r.name} wants {r.temp_bytes} bytes of temporaries, more than {temp_bytes}")
    return said


def _subprocess(cases: list[Case]) -> dict[str, Compiled]:
    with tempfile.TemporaryDirectory() as dump:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "LIBTPU_INIT_ARGS": "", "DUMP": dump}
        # A compiler that crashes looks up its symbols first, which takes longer than all cases.
        environment["LLVM_DISABLE_SYMBOLIZATION"] = "1"
        path = [str(HERE), str(HERE.parents[1]), str(APART), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(x for x in path if x)
        if cases[0].target == "h100":
            # PTX alone: printing kernels between their passes while others compile, jaxlib 0.12 crashes or hangs.
            flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text=false --xla_gpu_dump_llvmir=false"
            environment["XLA_FLAGS"] = f"{flags} --xla_dump_emitter_re=ptx --xla_gpu_cuda_data_dir={_cuda()}"
        elif cases[0].schedule:
            environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        run = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps(cases),
            env=environment,
            capture_output=True,
            text=True,
            timeout=60 + SECONDS_A_CASE * len(cases),
        )
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    results = {r.name: r for r in (Compiled(**json.loads(line)) for line in lines)}
    for case in cases:
        results.setdefault(case.name, Compiled(case.name, f"the compiler's process ended: {run.stderr[-1000:]}"))
    return results


def _cuda() -> pathlib.Path:
    """The directory of nvidia-cuda-nvcc, which has bin/ptxas."""
    places = [APART / "nvidia", *(pathlib.Path(p) / "nvidia" for p in sys.path)]
    return next((p / "cu13" for p in places if (p / "cu13/bin/ptxas").is_file()), pathlib.Path("/usr/local/cuda"))


@functools.cache
def _device(target: str):
    from kernels_pallas.absent import open_topology

    return open_topology(target)[0]


def yardstick() -> float:
    """Processor seconds of tracing and compiling, for this machine's own processor, a program that stays the same."""
    import jax
    import jax.numpy as jnp

    def program(x):
        for i in range(8):
            x = jnp.tanh(x @ x + i) * jax.nn.softmax(x, axis=i % 2) + jnp.cumsum(x, axis=1).sum(axis=0)
        return x

    before = time.process_time()
    with jax.default_device(jax.devices("cpu")[0]):
        jax.jit(program).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
    return time.process_time() - before


def slowness(*yards: float) -> float:
    """How much longer than the bounds expect this machine takes, by yards measured before and after; at least 1."""
    return max(1.0, sum(yards) / len(yards) / YARDSTICK)


def _compile(case: Case) -> Compiled:
    import jax
    from jax.experimental.layout import Format, Layout
    from jax.sharding import SingleDeviceSharding

    from kernels_pallas.absent import compiling_for

    device = _device(case.target)
    module, name = case.function.split(":")
    function, shapes, *free = getattr(importlib.import_module(module), name)(**case.arguments)
    here = SingleDeviceSharding(device)
    anyhow = Format(Layout.AUTO, here)
    inputs = [jax.tree.map(lambda _, i=i: anyhow if free and i in free[0] else here, x) for i, x in enumerate(shapes)]
    dump, yard, before = pathlib.Path(os.environ["DUMP"]), yardstick(), time.process_time()
    old = set(dump.iterdir())
    with compiling_for(device):
        jitted = jax.jit(function, in_shardings=tuple(inputs), out_shardings=anyhow if free else here)
        if any(x.sharding is not None for x in jax.tree.leaves(shapes)):
            jitted = jax.jit(function)
        compiled = jitted.lower(*shapes).compile()
    seconds = time.process_time() - before
    seconds /= slowness(yard, yardstick())
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed", 0.0)
    result = Compiled(case.name, "", seconds, compiled.memory_analysis().temp_size_in_bytes, accessed)
    new = sorted(set(dump.iterdir()) - old)
    if case.target == "h100":
        return result._replace(**_ptxas(new))
    return result._replace(bundles=_bundles(new))


def _bundles(files: list[pathlib.Path]) -> dict[str, dict[str, int]]:
    """Instruction bundles, one a cycle, by kernel and loop depth, of the final schedule that libtpu dumps."""
    found: dict[str, dict[str, int]] = {}
    for file in files:
        name = re.fullmatch(r"\d+-(.+?)(\.\d+)?-\d+-final_bundles\.txt", file.name)
        if name is None or name[1].startswith("<"):
            continue
        counts = found.setdefault(name[1], {})
        for line in file.open():
            if bundle := re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(?:\w\w)?\s*:\s*(>*)", line):
                depth = str(len(bundle[1]))
                counts[depth] = counts.get(depth, 0) + 1
    return found


def _ptxas(files: list[pathlib.Path]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {"registers": {}, "spilled": {}}
    for file in files:
        if file.suffix != ".ptx" or not file.stat().st_size:
            continue
        command = [_cuda() / "bin/ptxas", "-v", "-arch=sm_90a", file, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        for entry in re.split(r"Compiling entry function '", said)[1:]:
            name = entry.split("'")[0]
            if registers := re.search(r"Used (\d+) registers", entry):
                found["registers"][name] = max(int(registers[1]), found["registers"].get(name, 0))
            if spilled := re.search(r"(\d+) bytes spill stores", entry):
                found["spilled"][name] = max(int(spilled[1]), found["spilled"].get(name, 0))
    return found


def _main() -> None:
    yardstick()  # the first one also loads what the others find loaded
    for case in (Case(*x) for x in json.load(sys.stdin)):
        try:
            result = _compile(case)
        except Exception as error:  # whatever a compiler raises is the case's result
            result = Compiled(case.name, f"{type(error).__name__}: {str(error)[:3000]}")
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(result._asdict()), flush=True)


if __name__ == "__main__":
    _main()
