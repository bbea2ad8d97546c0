"""`hypenet plan`: every stage of a config on every mesh of every machine asked for, compiled and put into a table."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.settings import ConvertConfig, PretrainConfig
from hypenet_jax.halo.workdir import write_json
from hypenet_jax.hub.published import config_of
from hypenet_jax.model import ModelConfig
from hypenet_jax.parallel.mesh import SLICES, check_axes, make_mesh
from hypenet_jax.parallel.presets import MOST_FSDP, PRESETS, preset, spread
from hypenet_jax.plan.compile import QUICK, Compiled, compile_work, held
from hypenet_jax.plan.machines import (
    GIB,
    Machine,
    machine,
    open_devices,
    use_cpu,
)
from hypenet_jax.plan.places import PLAN, check_places
from hypenet_jax.plan.remedies import remedy
from hypenet_jax.plan.roofline import roofline
from hypenet_jax.plan.stages import Work, stages_of, work_of
from hypenet_jax.plan.table import describe, describe_total, overview


def plan(
    config: ConvertConfig | PretrainConfig,
    topologies: Sequence[str],
    meshes: Sequence[str] = (),
    stages: Sequence[str] | None = None,
    *,
    effort: float = QUICK,
    json_file: str | None = None,
    directory: str | None = None,
    say: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
    """Compile, print as it goes, and return one record a stage, mesh and machine.

    Args:
      config: of a conversion, whose teacher may be a directory with a config.json alone or a published name; or of
        training from scratch.
      topologies: machines by name, see `machines.machine`.
      meshes: "fsdp=16,tensor=4", each tried on every machine; none takes the config's mesh where it multiplies to the
        machine's chips, else the machine's preset.
      stages: of `stages.stages_of`; None takes all of them.
      effort: `compile.QUICK`, or `compile.FULL` to compile as the run will.
      json_file, directory: where the records, and the table with the plot, are written; None writes none.

    Raises:
      HypenetError: an unknown machine, a mesh that does not multiply to its chips, a missing compiler, a teacher whose
        sizes are not known, or a stage whose sizes divide over none of the meshes. One that divides over some of them
        has a record that says so for each of the others.
    """
    teacher = config_of(config.teacher) if isinstance(config, ConvertConfig) else None
    machines = [machine(name) for name in dict.fromkeys(topologies)]
    given = [parsed_mesh(text) for text in dict.fromkeys(meshes)]
    use_cpu(max((m.chips for m in machines if m.platform == "cpu"), default=1))
    wanted = list(dict.fromkeys(stages or stages_of(config)))
    # What can be wrong is said before the first compilation, which may take minutes.
    cells = _cells(config, machines, given)
    refused = _refused(cells, wanted, teacher)
    check_places(PLAN, json_file, directory)
    records: list[dict[str, Any]] = []
    for place, cell in enumerate(cells):
        say(f"{cell.machine.name}, {cell.machine.chips} chips, mesh {written(cell.axes)}")
        for stage in wanted:
            why = refused.get((place, stage))
            records.append(_without(stage, cell, why) if why else _record(stage, cell, teacher, effort, say))
            say(describe(records[-1]))
            if json_file:
                write_json(pathlib.Path(json_file), records)
        if total := describe_total(records[-len(wanted) :]):
            say(total)
    if len(records) > 1:
        say(overview(records))
    if directory:
        from hypenet_jax.plan.plot import write_plan

        say(f"the table and the plot are in {write_plan(records, pathlib.Path(directory))}")
    return records


@dataclasses.dataclass(frozen=True)
class _Cell:
    """One mesh of one machine, and the config as it is planned there."""

    config: ConvertConfig | PretrainConfig
    machine: Machine
    mesh: jax.sharding.Mesh
    axes: dict[str, int]


def _cells(
    config: ConvertConfig | PretrainConfig, machines: Sequence[Machine], given: Sequence[dict[str, int]]
) -> list[_Cell]:
    """Every mesh of every machine once."""
    cells: list[_Cell] = []
    for one in machines:
        for axes in given or [_default_mesh(config, one)]:
            with named(f"{one.name}, mesh {written(axes)}"):
                cell = _cell(config, one, axes)
            if not any(cell.machine == other.machine and cell.mesh == other.mesh for other in cells):
                cells.append(cell)
    return cells


def _refused(cells: Sequence[_Cell], wanted: Sequence[str], teacher: ModelConfig | None) -> dict[tuple[int, str], str]:
    """(place of a cell, stage) -> why that stage cannot run there.

    A sweep goes on without it. What can run in no cell is a mistake in the config or in the only mesh, and raises.
    """
    why: dict[tuple[int, str], str] = {}
    for place, cell in enumerate(cells):
        for stage in wanted:
            try:
                work_of(stage, cell.config, teacher, cell.mesh)
            except HypenetError as error:
                why[place, stage] = str(error)
    for stage in wanted:
        if all((place, stage) in why for place in range(len(cells))):
            first = cells[0]
            with named(f"{stage} on {first.machine.name}, mesh {written(first.axes)}"):
                raise HypenetError(why[0, stage])
    return why


def _without(stage: str, cell: _Cell, why: str) -> dict[str, Any]:
    """The record of a stage that a cell cannot run."""
    memory = cell.machine.chip.memory
    return {
        "stage": stage,
        "machine": cell.machine.name,
        "chips": cell.machine.chips,
        "mesh": cell.axes,
        "fits": False,
        "refused": why,
        "memory_bytes": memory and memory * GIB,
        "steps": getattr(getattr(cell.config, stage, None), "steps", 0),
    }


def _cell(config: ConvertConfig | PretrainConfig, one: Machine, axes: dict[str, int]) -> _Cell:
    here = dataclasses.replace(config, dtype="float32") if one.platform == "cpu" else config
    mesh = make_mesh(axes, open_devices(one))
    # The sizes that they have come to: one may have been "the rest".
    return _Cell(here, one, mesh, {name: mesh.shape[name] for name in axes if name in mesh.shape})


@contextlib.contextmanager
def named(member: str) -> Iterator[None]:
    """Which member of several a mistake is in."""
    try:
        yield
    except HypenetError as error:
        raise HypenetError(f"{member}: {error}") from None


def _record(
    stage: str, cell: _Cell, teacher: ModelConfig | None, effort: float, say: Callable[[str], Any]
) -> dict[str, Any]:
    one = cell.machine

    def compile_with(config: ConvertConfig | PretrainConfig, axes: dict[str, int]) -> Compiled:
        other = make_mesh(axes, list(cell.mesh.devices.flat))
        work = work_of(stage, config, teacher, other)
        least = sum(held(tree) for tree in work.parts.values() if tree is not None)
        if one.chip.memory and least > one.chip.memory * GIB:
            raise HypenetError(f"the arguments alone take {least / GIB:.1f} GiB; divide them further")
        return compile_work(work, other, effort, one)

    work = work_of(stage, cell.config, teacher, cell.mesh)
    compiled = compile_work(work, cell.mesh, effort, one)
    record = _numbers(work, compiled, one, cell.mesh, cell.axes)
    if compiled.short:
        record["remedy"] = remedy(stage, cell.config, cell.axes, compile_with, say)
    return record


def _numbers(
    work: Work, compiled: Compiled, one: Machine, mesh: jax.sharding.Mesh, axes: dict[str, int]
) -> dict[str, Any]:
    """The record of a compiled step, JSON-able; bytes, operations and seconds are per chip and step."""
    record: dict[str, Any] = {
        "stage": work.name,
        "machine": one.name,
        "chips": one.chips,
        "mesh": axes,
        "fits": not compiled.short,
        "short_bytes": compiled.short,
        "memory_bytes": one.chip.memory and one.chip.memory * GIB,
        "parts_bytes": compiled.parts,
        "compile_seconds": round(compiled.seconds, 1),
        "flops": work.flops / mesh.size,
        "tokens_per_step": work.tokens,
        "steps": work.steps,
    }
    if compiled.short:
        return record
    record |= {
        "temporary_bytes": compiled.temporaries,
        "code_bytes": compiled.code,
        "total_bytes": compiled.total,
        "little_room": compiled.tight,
        "traffic_bytes": compiled.traffic,
        "traffic_apart_bytes": compiled.apart,
        "largest": dict(compiled.largest),
        "collectives": [dataclasses.asdict(c) | {"sent": c.sent} for c in compiled.collectives],
    }
    bounds = roofline(work, compiled, one, mesh)
    if bounds is not None:
        record["seconds"] = {"compute": bounds.compute, "memory": bounds.memory, "network": bounds.network}
        record["seconds"] |= {"apart": bounds.apart} if bounds.apart else {}
        record["step_seconds"] = [bounds.least, bounds.one_by_one]
        record["tokens_per_second"] = [work.tokens / seconds for seconds in (bounds.one_by_one, bounds.least)]
        if work.steps:
            hours = [seconds * work.steps * one.chips / 3600 for seconds in (bounds.least, bounds.one_by_one)]
            record |= {"chip_hours": hours, "tokens": work.tokens * work.steps}
    return record


def written(axes: dict[str, int]) -> str:
    """A mesh as `--mesh` takes it, axes of size 1 left out."""
    return ",".join(f"{name}={size}" for name, size in axes.items() if size != 1) or "one device"


def parsed_mesh(text: str) -> dict[str, int]:
    """The sizes of "fsdp=16,tensor=4"; HypenetError for another form."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)=(-?[0-9]{1,9})\s*", part)
        if not found:
            raise HypenetError(f"mesh {text!r} is not of the form axis=size,axis=size, for example fsdp=16,tensor=4")
        if found[1] in axes:
            raise HypenetError(f"mesh {text!r} gives {found[1]} twice; give each axis once")
        axes[found[1]] = int(found[2])
    return axes


def _default_mesh(config: ConvertConfig | PretrainConfig, one: Machine) -> dict[str, int]:
    """The config's mesh where it can multiply to the machine's chips and slices, else one for the machine."""
    check_axes(config.mesh)
    rest = one.chips // math.prod(size for size in config.mesh.values() if size != -1)
    sizes = {name: rest if size == -1 else size for name, size in config.mesh.items()}
    slices = one.platform != "tpu" or sizes.get(SLICES, 1) == one.slices
    if config.mesh and math.prod(sizes.values()) == one.chips and slices:
        return dict(config.mesh)
    if one.hosts > 1:
        # Rows are split over hosts, too.
        fsdp = max(1, min(one.chips // one.hosts, MOST_FSDP // one.hosts))
        tensor = one.chips // one.hosts // fsdp
        return {SLICES: one.hosts, "fsdp": fsdp} | ({"tensor": tensor} if tensor > 1 else {})
    return preset(one.name) if one.slices > 1 or one.name in PRESETS else spread(one.chips)
