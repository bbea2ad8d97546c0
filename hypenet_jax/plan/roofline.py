"""How long a step takes at least: its work over the rates of the machine."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.sharding import Mesh

from hypenet_jax.parallel.mesh import SLICES
from hypenet_jax.plan.compile import Compiled
from hypenet_jax.plan.machines import Machine
from hypenet_jax.plan.stages import Work


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step, each at the peak rate of the chip: no prediction, no measurement."""

    compute: float
    memory: float
    network: dict[str, float]  # by mesh axes

    @property
    def least(self) -> float:
        """Everything beside everything else."""
        return max(self.compute, self.memory, *self.network.values(), 0.0)

    @property
    def one_by_one(self) -> float:
        """Nothing beside anything else, each at its peak rate."""
        return max(self.compute, self.memory) + sum(self.network.values())


def roofline(work: Work, compiled: Compiled, machine: Machine, mesh: Mesh) -> Roofline | None:
    """The bounds of one step; None for a machine whose rates are not stated (a CPU)."""
    chip = machine.chip
    if not chip.flops:
        return None
    network: dict[str, float] = {}
    for one in compiled.collectives:
        name = "+".join(one.axes)
        network[name] = network.get(name, 0.0) + one.sent / axis_rate(one.axes, machine, mesh)
    return Roofline(work.flops / mesh.size / chip.flops, compiled.traffic / chip.memory_rate, network)


def axis_rate(axes: tuple[str, ...], machine: Machine, mesh: Mesh) -> float:
    """Bytes a second that a chip sends along mesh axes: over DCN, NVLink, or two ports of each torus axis they span.

    A torus axis that does not close upon itself (on v5e and v6e all but those of 16 chips) gives less.
    """
    if SLICES in axes:
        return machine.chip.dcn_rate
    if machine.platform != "tpu":
        return machine.chip.link_rate
    return 2 * machine.chip.link_rate * max(1, torus_axes(axes, mesh))


def torus_axes(axes: tuple[str, ...], mesh: Mesh) -> int:
    """Along how many axes of the machine's torus a group of devices of these mesh axes lies."""
    places = [mesh.axis_names.index(axis) for axis in axes]
    group = np.moveaxis(mesh.devices, places, range(len(places))).reshape(-1, mesh.size // _size(axes, mesh))[:, 0]
    coordinates = np.asarray([device.coords for device in group])
    return int((coordinates != coordinates[0]).any(axis=0).sum())


def _size(axes: tuple[str, ...], mesh: Mesh) -> int:
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size
