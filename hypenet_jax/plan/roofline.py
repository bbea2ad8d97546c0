"""How long a step takes at least: its work over the rates of the machine."""

from __future__ import annotations

import dataclasses

import jax
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
    apart: float = 0.0  # the part of `memory` that a GPU moves in kernels of its own, before or after the products

    @property
    def least(self) -> float:
        """Everything beside everything else."""
        return max(self.compute, self.memory, *self.network.values(), 0.0)

    @property
    def one_by_one(self) -> float:
        """Nothing beside anything else, each at its peak rate.

        A TPU reads ahead while it multiplies. A GPU runs one kernel after another, and only a matrix product's own
        operands move while it multiplies.
        """
        return max(self.compute, self.memory - self.apart) + self.apart + sum(self.network.values())


def roofline(work: Work, compiled: Compiled, machine: Machine, mesh: Mesh) -> Roofline | None:
    """The bounds of one step; None for a machine whose rates are not stated (a CPU)."""
    chip = machine.chip
    if not chip.flops:
        return None
    network: dict[str, float] = {}
    for one in compiled.collectives:
        name = "+".join(one.axes)
        network[name] = network.get(name, 0.0) + one.sent / axis_rate(one.axes, machine, mesh)
    apart = compiled.apart / chip.memory_rate if machine.platform == "gpu" else 0.0
    return Roofline(work.flops / mesh.size / chip.flops, compiled.traffic / chip.memory_rate, network, apart)


def axis_rate(axes: tuple[str, ...], machine: Machine, mesh: Mesh) -> float:
    """Bytes a second that a chip sends along mesh axes: over DCN, NVLink, or two ports of each torus axis they span.

    GPUs of several hosts send at the rate of the network between the hosts, though a part of it stays within one.

    A torus axis that does not close upon itself (on v5e and v6e all but those of 16 chips) gives less.
    """
    if SLICES in axes:
        return machine.chip.dcn_rate
    if machine.platform != "tpu":
        return machine.chip.dcn_rate if machine.hosts > 1 and between_hosts(axes, mesh) else machine.chip.link_rate
    return 2 * machine.chip.link_rate * max(1, torus_axes(axes, mesh))


def torus_axes(axes: tuple[str, ...], mesh: Mesh) -> int:
    """Along how many axes of the machine's torus a group of devices of these mesh axes lies."""
    coordinates = np.asarray([device.coords for device in _group(axes, mesh)])
    return int((coordinates != coordinates[0]).any(axis=0).sum())


def between_hosts(axes: tuple[str, ...], mesh: Mesh) -> bool:
    """Whether a group of devices of these mesh axes lies on more than one host."""
    return len({device.process_index for device in _group(axes, mesh)}) > 1


def _group(axes: tuple[str, ...], mesh: Mesh) -> list[jax.Device]:
    """The first of the groups of devices that differ along these axes only."""
    places = [mesh.axis_names.index(axis) for axis in axes]
    return list(np.moveaxis(mesh.devices, places, range(len(places))).reshape(_size(axes, mesh), -1)[:, 0])


def _size(axes: tuple[str, ...], mesh: Mesh) -> int:
    size = 1
    for axis in axes:
        size *= mesh.shape[axis]
    return size
