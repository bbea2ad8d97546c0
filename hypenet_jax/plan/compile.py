"""Compile a stage's step for its machine, and read what the compiled program says of itself."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from hypenet_jax.errors import HypenetError
from hypenet_jax.plan.collectives import Collective, collectives
from hypenet_jax.plan.hlo import Program
from hypenet_jax.plan.machines import GIB, Machine, compiler_options
from hypenet_jax.plan.stages import Work
from hypenet_jax.plan.traffic import memory_traffic

# XLA's effort at run time. For TPUs, QUICK compiles the same program, divided and laid out alike, without the search
# for a better schedule, several times faster. For GPUs there is no difference, save where memory is short
# (`machines.compiler_options`). By JAX's name of it: `EFFORT` up to 0.10, later `LEVEL`.
QUICK, FULL = -1.0, 0.0
# The share by which temporaries may grow at the effort of a run: a TPU's gathers that are hidden behind other work hold
# on to memory (of 4 layers of the 2B student 5.4 GiB instead of 3.9, of all 28 6.60 instead of 4.72).
HELD_ON_TO = 0.4
EFFORT, LEVEL = "jax_exec_time_optimization_effort", "jax_optimization_level"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiled step is, per device; bytes.

    parts: of the arguments, by name. temporaries: activations, gathered weights, gradients. code: the program itself.
    short: by how much it does not fit, 0 where it fits; else a TPU's compiler says nothing else but the parts. tight:
    see `little_room`. traffic:
    bytes read and written in main memory; apart: those of them that no matrix product moves. seconds: of tracing and
    compiling.
    """

    parts: dict[str, float]
    temporaries: float = 0.0
    code: float = 0.0
    short: float = 0.0
    tight: bool = False
    traffic: float = 0.0
    apart: float = 0.0
    collectives: tuple[Collective, ...] = ()
    largest: tuple[tuple[str, float], ...] = ()
    seconds: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts.values()) + self.temporaries + self.code


def compile_work(work: Work, mesh: Mesh, effort: float = QUICK, machine: Machine | None = None) -> Compiled:
    """Compile a step for the devices of its mesh; a program that is too large for them is a result, not an error.

    `machine`: whose devices they are, for what its compiler does not know by itself.
    """
    parts = {name: held(tree) for name, tree in work.parts.items() if tree is not None}
    start = time.monotonic()
    try:
        with _effort(effort), jax.set_mesh(mesh):
            lowered = work.step.lower(*work.arguments)
            compiled = lowered.compile(compiler_options(machine, effort == QUICK) if machine else None)
    except jax.errors.JaxRuntimeError as error:
        short = _too_large(str(error), sum(parts.values()))
        if short is None:
            raise
        return Compiled(parts, short=short, seconds=time.monotonic() - start)
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    program = Program(compiled.as_text())
    # What the compiler adds to the arguments: padding, and results that take no argument's place.
    beside = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    beside = max(0.0, beside - sum(parts.values()))
    usable = machine.usable if machine else None
    total = sum(parts.values()) + beside + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    traffic, apart = memory_traffic(program)
    return Compiled(
        parts=parts,
        short=max(0.0, total - usable) if usable else 0.0,
        tight=little_room(total, memory.temp_size_in_bytes + beside, effort, machine),
        temporaries=memory.temp_size_in_bytes + beside,
        code=memory.generated_code_size_in_bytes,
        traffic=traffic,
        apart=apart,
        collectives=tuple(collectives(program, dict(mesh.shape))),
        largest=_largest(program),
        seconds=seconds,
    )


def little_room(total: float, temporaries: float, effort: float, machine: Machine | None) -> bool:
    """Whether a program that fits a TPU, compiled at `QUICK`, might not at the effort of a run. Bytes of a chip."""
    if effort != QUICK or machine is None or machine.platform != "tpu" or not machine.chip.memory:
        return False
    return total + HELD_ON_TO * temporaries > machine.chip.memory * GIB


def held(tree: Any) -> float:
    """Bytes of abstract arrays on one device."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def _largest(program: Program, most: int = 8) -> tuple[tuple[str, float], ...]:
    """The largest arrays that any instruction makes: ("bf16[6,512,2048]", bytes), for tests and for the curious."""
    sizes: dict[str, float] = {}
    for name in program.runs():
        for instruction in program.computations[name].values():
            for array in instruction.arrays:
                sizes[f"{array.dtype}[{','.join(map(str, array.dims))}]"] = array.size
    return tuple(sorted(sizes.items(), key=lambda one: -one[1])[:most])


_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"


def _too_large(message: str, arguments: float) -> float | None:
    """Bytes beyond the memory of a device, of the compiler's message; None for another failure.

    `arguments`: bytes of what lies there already, which one of the compiler's sentences leaves out.
    """
    if found := re.search(rf"xceeded hbm capacity by {_SIZE}", message):
        return float(found[1]) * _BYTES[found[2]]
    if found := re.search(rf"temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)", message):
        return float(found[1]) * _BYTES[found[2]] - float(found[3]) * _BYTES[found[4]] + arguments
    if "RESOURCE_EXHAUSTED" in message:
        raise HypenetError(f"the compiler says that memory does not suffice but not by how much: {message[:200]}")
    return None


@contextlib.contextmanager
def _effort(effort: float) -> Iterator[None]:
    wanted: dict[str, Any] = (
        {EFFORT: effort} if hasattr(jax.config, EFFORT) else {LEVEL: "O0" if effort == QUICK else "UNKNOWN"}
    )
    # A program for an absent machine cannot be put into the cache of this one.
    wanted["jax_enable_compilation_cache"] = False
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, getattr(value, "name", value))
