"""`hypenet plan`: every stage of a config on every mesh of every machine asked for, compiled and put into a table."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.settings import ConvertConfig, PretrainConfig
from hypenet_jax.halo.workdir import write_json
from hypenet_jax.hub.published import config_of
from hypenet_jax.model import ModelConfig
from hypenet_jax.parallel.mesh import SLICES, make_mesh
from hypenet_jax.parallel.presets import PRESETS
from hypenet_jax.plan.compile import QUICK, Compiled, compile_work
from hypenet_jax.plan.machines import (
    GIB,
    Machine,
    machine,
    open_devices,
    use_cpu,
)
from hypenet_jax.plan.remedies import remedy
from hypenet_jax.plan.roofline import roofline
from hypenet_jax.plan.stages import Work, stages_of, work_of
from hypenet_jax.plan.table import describe, overview


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
        sizes are not known, or batches that do not divide.
    """
    teacher = config_of(config.teacher) if isinstance(config, ConvertConfig) else None
    machines = [machine(name) for name in topologies]
    use_cpu(max((m.chips for m in machines if m.platform == "cpu"), default=1))
    records = []
    for one in machines:
        devices = open_devices(one)
        here = dataclasses.replace(config, dtype="float32") if one.platform == "cpu" else config
        for axes in [parsed_mesh(text) for text in meshes] or [_default_mesh(config, one)]:
            mesh = make_mesh(axes, devices)
            say(f"{one.name}, {one.chips} chips, mesh {written(axes)}")
            for stage in stages or stages_of(config):
                records.append(_record(stage, here, teacher, one, mesh, axes, effort, say))
                say(describe(records[-1]))
    if len(records) > 1:
        say(overview(records))
    if json_file:
        write_json(pathlib.Path(json_file), records)
    if directory:
        from hypenet_jax.plan.plot import write_plan

        say(f"the table and the plot are in {write_plan(records, pathlib.Path(directory))}")
    return records


def _record(
    stage: str,
    config: ConvertConfig | PretrainConfig,
    teacher: ModelConfig | None,
    one: Machine,
    mesh: jax.sharding.Mesh,
    axes: dict[str, int],
    effort: float,
    say: Callable[[str], Any],
) -> dict[str, Any]:
    def compile_with(config: ConvertConfig | PretrainConfig, axes: dict[str, int]) -> Compiled:
        other = make_mesh(axes, list(mesh.devices.flat))
        return compile_work(work_of(stage, config, teacher, other), other, effort, one)

    work = work_of(stage, config, teacher, mesh)
    compiled = compile_work(work, mesh, effort, one)
    record = _numbers(work, compiled, one, mesh, axes)
    if compiled.short:
        record["remedy"] = remedy(stage, config, axes, compile_with, say)
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
        name, _, size = part.partition("=")
        if not size.lstrip("-").isdigit():
            raise HypenetError(f"mesh {text!r} is not of the form axis=size,axis=size, for example fsdp=16,tensor=4")
        axes[name] = int(size)
    return axes


def _default_mesh(config: ConvertConfig | PretrainConfig, one: Machine) -> dict[str, int]:
    size = 1
    for count in config.mesh.values():
        size *= count
    if config.mesh and size == one.chips:
        return dict(config.mesh)
    if one.hosts > 1:
        return {SLICES: one.hosts, "fsdp": one.chips // one.hosts}
    return dict(PRESETS.get(one.name, {"fsdp": one.chips}))
