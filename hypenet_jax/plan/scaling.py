"""`hypenet scaling`: steps of a stage, run on several meshes of the devices that are here, and what each gains."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.settings import ConvertConfig
from hypenet_jax.halo.workdir import write_json
from hypenet_jax.hub.published import config_of
from hypenet_jax.model import ModelConfig
from hypenet_jax.parallel import processes
from hypenet_jax.parallel.mesh import SLICES, check_axes, check_compute_dtype, make_mesh
from hypenet_jax.parallel.rules import batch_sharding
from hypenet_jax.plan.machines import MOST_CPUS
from hypenet_jax.plan.places import SCALING, check_places
from hypenet_jax.plan.planning import named, parsed_mesh, written
from hypenet_jax.plan.running import WARM_UP, random_arrays, timed_steps
from hypenet_jax.plan.stages import Work, work_of
from hypenet_jax.plan.table import aligned
from hypenet_jax.plan.trace import busy_seconds
from hypenet_jax.train.checkpoint import versions

TRACED = 3
COLUMNS = (
    "mesh", "devices", "rows", "microbatches", "ms/step", "tokens/s", "efficiency", "compute ms", "collectives ms",
    "input ms", "loss differs",
)  # fmt: skip


def scaling(
    config: ConvertConfig,
    meshes: Sequence[str],
    steps: int,
    *,
    stage: str = "distill",
    weak: bool = False,
    json_file: str | None = None,
    directory: str | None = None,
    say: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
    """Run, print and write as it goes, and return one record a mesh.

    Weights and tokens are random: they cost what real ones cost. The step is the one that training runs. Every number
    is measured: a step is the median over `steps` with a batch that lies on the devices, `input` is what the median
    grows by when each step waits for a new batch from the host, compute and collectives are of a profiler's trace
    (`trace.busy_seconds`) of process 0. Efficiency is throughput a device, relative to the mesh of the fewest devices.
    The weights and, without `weak`, the batches are the same on every mesh, so that losses and gradient norms can be
    compared: `loss_difference` is the largest one relative to that mesh's, over all steps. With several processes all
    of them call it; those without devices of a mesh wait, and process 0 writes and says.

    Args:
      meshes: "fsdp=2,tensor=2", each on as many of the devices as it takes, those of the first processes.
      weak: the config's batch is that of the smallest mesh and grows with the devices. Else it is the same on every
        mesh, and in fewer microbatches where its rows are divided between more devices: the config's number is that of
        the smallest mesh.
      json_file, directory: where the records, and the table with the plot, are written; None writes none.

    Raises:
      HypenetError: a mesh of more devices than there are, a batch that does not divide over one, or a place that cannot
        be written; all of it before the first step.
    """
    if steps < 1:
        raise HypenetError(f"steps is {steps}; it must be at least 1")
    cells = _cells(config, meshes, stage, weak)
    processes.first(lambda: check_places(SCALING, json_file, directory))
    say = processes.said_once(say)
    records: list[dict[str, Any]] = []
    for cell in cells:
        if jax.process_index() in {device.process_index for device in cell.mesh.devices.flat}:
            records.append(_measure(cell, stage, steps))
            say(f"{written(cell.axes)}: {records[-1]['tokens_per_second']:,.0f} tokens/s")
            _compare(records, weak)
        # After every mesh: a run that is killed keeps what it has measured.
        processes.first(lambda: _write(records, json_file, directory))
    say(f"{stage}, {'weak' if weak else 'strong'} scaling, {jax.devices()[0].device_kind}\n{aligned(_table(records))}")
    if directory:
        say(f"the table and the plot are in {pathlib.Path(directory) / SCALING.page}")
    return records


@dataclasses.dataclass(frozen=True)
class _Cell:
    """A mesh, and the config as it is run there."""

    config: ConvertConfig
    teacher: ModelConfig
    mesh: Mesh
    axes: dict[str, int]


def _cells(config: ConvertConfig, meshes: Sequence[str], stage: str, weak: bool) -> list[_Cell]:
    """All meshes, known to be right: the first step of any of them may take minutes to compile."""
    teacher = config_of(config.teacher)
    wanted = [parsed_mesh(text) for text in meshes]
    for text, axes in zip(meshes, wanted, strict=True):
        with named(f"mesh {text!r}"):
            check_axes(axes)
            _check_sized(axes)
    sizes = [math.prod(axes.values()) for axes in wanted]
    _enough_devices(dict(zip(meshes, sizes, strict=True)))
    check_compute_dtype(config.dtype)
    # Whole processes, of which process 0 is always one.
    devices = sorted(jax.devices(), key=lambda device: device.process_index)
    fewest = _row_shards(wanted[sizes.index(min(sizes))])
    cells = []
    for text, axes, size in zip(meshes, wanted, sizes, strict=True):
        with named(f"mesh {text!r}"):
            grown = _grown(config, stage, size, min(sizes)) if weak else None
            changed = grown or _divided(config, stage, _row_shards(axes), fewest)
            mesh = make_mesh(axes, devices[:size])
            work_of(stage, changed, teacher, mesh)
        cells.append(_Cell(changed, teacher, mesh, axes))
    return cells


def _compare(records: list[dict[str, Any]], weak: bool) -> None:
    """Give every record its efficiency, relative to the smallest mesh that has been measured, and how losses differ."""
    base = min(records, key=lambda record: record["devices"])
    for record in records:
        each = record["tokens_per_second"] / record["devices"]
        record["efficiency"] = each / (base["tokens_per_second"] / base["devices"])
        # Weak: other batches, with nothing to compare.
        for name, values in (("loss_difference", "losses"), ("norm_difference", "gradient_norms")):
            record[name] = None if weak else _largest_difference(record[values], base[values])


def _largest_difference(these: Sequence[float], those: Sequence[float]) -> float:
    """Relative to `those`."""
    return max(abs(a - b) / abs(b) for a, b in zip(these, those, strict=True))


def _write(records: list[dict[str, Any]], json_file: str | None, directory: str | None) -> None:
    if json_file:
        write_json(pathlib.Path(json_file), records)
    if directory:
        from hypenet_jax.plan.plot import write_scaling

        write_scaling(records, _table(records), pathlib.Path(directory))


def _measure(cell: _Cell, stage: str, steps: int) -> dict[str, Any]:
    mesh = cell.mesh
    work = work_of(stage, cell.config, cell.teacher, mesh)
    start = time.monotonic()
    state, frozen = (random_arrays(tree, seed) for seed, tree in enumerate(work.arguments[:2]))
    batches = _batches(work, cell.teacher.vocab_size)
    batch = _placed(next(batches), mesh)
    with jax.set_mesh(mesh):
        state, warm = timed_steps(work.step, state, frozen, itertools.repeat(batch, WARM_UP))
        started = time.monotonic() - start
        state, in_place = timed_steps(work.step, state, frozen, itertools.repeat(batch, steps))
        new = (_placed(one, mesh) for one in itertools.islice(batches, steps))
        state, fed = timed_steps(work.step, state, frozen, new)
        with tempfile.TemporaryDirectory() as traces:
            with jax.profiler.trace(traces):
                timed_steps(work.step, state, frozen, itertools.repeat(batch, TRACED))
            compute, collective = busy_seconds(traces, len(mesh.local_devices))
    seconds, waiting = statistics.median(in_place.whole), statistics.median(fed.whole)
    return {
        "stage": stage,
        "mesh": cell.axes,
        "devices": mesh.size,
        "device": jax.devices()[0].device_kind,
        "rows": getattr(cell.config, stage).batch_size,
        "microbatches": getattr(cell.config, stage).gradient_accumulation,
        "step_seconds": seconds,
        "tokens_per_second": work.tokens / waiting,
        "compute_seconds": compute / TRACED,
        "collective_seconds": collective / TRACED,
        "input_seconds": max(0.0, waiting - seconds),
        "start_seconds": round(started, 1),
        "step_seconds_all": in_place.running,
        "losses": warm.losses + in_place.losses + fed.losses,
        "gradient_norms": warm.norms + in_place.norms + fed.norms,
        "peak_bytes": _peak(mesh),
        "versions": versions(),
    }


def _batches(work: Work, vocabulary: int):
    """Endless batches of random tokens on the host, whole rows of one document."""
    rng = np.random.default_rng(0)
    shape = next(iter(work.parts["batch"].values())).shape
    while True:
        tokens, targets = rng.integers(0, vocabulary, (2, *shape), dtype=np.int32)
        ids = np.zeros(shape, np.int32)
        yield {"tokens": tokens, "targets": targets, "segment_ids": ids, "loss_mask": ids == 0}


def _placed(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    return {name: processes.place(array, batch_sharding(mesh)) for name, array in batch.items()}


def _peak(mesh: Mesh) -> int | None:
    """The most memory that this process has had in use on one of its devices; None where a device keeps no count."""
    found = [device.memory_stats() or {} for device in mesh.local_devices]
    return max((stats.get("peak_bytes_in_use", 0) for stats in found), default=0) or None


def _check_sized(axes: dict[str, int]) -> None:
    for name, size in axes.items():
        if size < 1:
            raise HypenetError(f"mesh axis {name!r} has size {size}; a mesh of a list needs all its sizes")


def _grown(config: ConvertConfig, stage: str, size: int, smallest: int) -> ConvertConfig:
    settings = getattr(config, stage)
    rows = settings.batch_size * size
    if rows % smallest:
        raise HypenetError(
            f"{settings.batch_size} rows on {smallest} devices do not grow evenly to {size}; alter a mesh"
        )
    return dataclasses.replace(config, **{stage: dataclasses.replace(settings, batch_size=rows // smallest)})


def _divided(config: ConvertConfig, stage: str, shards: int, fewest: int) -> ConvertConfig:
    """With fewer microbatches by as much as a device's share of the rows is smaller than on the smallest mesh."""
    settings = getattr(config, stage)
    parts = settings.gradient_accumulation
    fewer = math.gcd(parts, shards // fewest) if shards % fewest == 0 else 1
    return dataclasses.replace(config, **{stage: dataclasses.replace(settings, gradient_accumulation=parts // fewer)})


def _row_shards(axes: dict[str, int]) -> int:
    """Devices, or groups of them, between which rows of the batch are divided."""
    return math.prod(axes.get(name, 1) for name in (SLICES, "data", "fsdp"))


def _enough_devices(sizes: dict[str, int]) -> None:
    """sizes: devices by mesh."""
    largest = max(sizes, key=lambda text: sizes[text])
    # Counts where JAX has not started; a CPU is then as many devices as are asked for, unless there are several
    # processes, each with its own.
    if not jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", min(sizes[largest], MOST_CPUS))
    here = len(jax.devices())
    if here < sizes[largest]:
        raise HypenetError(f"mesh {largest!r} has {sizes[largest]} devices and there are {here} here; leave it out")


def _table(records: list[dict[str, Any]]) -> list[list[str]]:
    return [list(COLUMNS), *(_row(record) for record in records)]


def _row(record: dict[str, Any]) -> list[str]:
    names = ("compute_seconds", "collective_seconds", "input_seconds")
    return [
        written(record["mesh"]),
        str(record["devices"]),
        str(record["rows"]),
        str(record["microbatches"]),
        f"{record['step_seconds'] * 1e3:.1f}",
        f"{record['tokens_per_second']:,.0f}",
        f"{record['efficiency']:.2f}",
        *(f"{record[name] * 1e3:.1f}" for name in names),
        "-" if record["loss_difference"] is None else f"{record['loss_difference']:.1e}",
    ]
