"""The device mesh: four named axes, always present, possibly of size 1; before them slices over DCN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from hypenet_jax.errors import HypenetError
from hypenet_jax.parallel.processes import connect

# data: replicas of the parameters; fsdp: parameters, moments and rows of the batch are split; seq: positions are split
# (context parallelism); tensor: heads, MLP width and vocabulary are split. Outermost first: the outer axes carry the
# least traffic, so on several hosts they are the ones that cross the slow network.
AXES = ("data", "fsdp", "seq", "tensor")
# Slices of a pod, or hosts, joined by the data-center network. Outermost, and part of the mesh only where it is larger
# than 1. The rules split rows of the batch over it and no parameter: once a step it carries the gradients' sum.
SLICES = "dcn"


def check_axes(axes: Mapping[str, int]) -> None:
    """Raise HypenetError for an unknown axis, or a size that none can have."""
    for name, size in axes.items():
        if name not in (SLICES, *AXES):
            raise HypenetError(f"mesh axis {name!r} is unknown; the axes are {', '.join((SLICES, *AXES))}")
        if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
            raise HypenetError(f"mesh axis {name!r} has size {size!r}; it must be a positive integer, or -1 (the rest)")


def _sizes(axes: Mapping[str, int] | None, count: int) -> dict[str, int]:
    """The size of each of AXES; -1 on one axis takes the devices that the others leave."""
    axes = {"fsdp": -1} if axes is None else dict(axes)
    check_axes(axes)
    sizes = {name: axes.get(name, 1) for name in (SLICES, *AXES) if name != SLICES or SLICES in axes}
    open_axes = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1:
        raise HypenetError(f"mesh axes {' and '.join(open_axes)} are all -1; only one axis can take the rest")
    if open_axes and count % known == 0:
        sizes[open_axes[0]] = count // known
    if math.prod(sizes.values()) != count:
        written = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise HypenetError(f"mesh {written} does not multiply to the {count} devices here; change the sizes")
    return sizes


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes ("data", "fsdp", "seq", "tensor"), every one of type Auto; with slices "dcn" before them.

    Several processes make it together: they are connected when it returns.

    Args:
      axes: sizes by axis name; an absent axis has size 1; one axis may be -1, "what the others leave". None puts every
        device on fsdp.
      devices: the devices of the mesh; None takes all of them.

    Raises:
      HypenetError: an unknown axis, sizes that do not multiply to the number of devices, or a "dcn" (1 where there is
        none) that is not the number of slices that TPUs form.
    """
    mesh = _mesh(axes, jax.devices() if devices is None else list(devices))
    connect(mesh)
    return mesh


def _mesh(axes: Mapping[str, int] | None, devices: Sequence[jax.Device]) -> Mesh:
    sizes = _sizes(axes, len(devices))
    slices = sizes.pop(SLICES, 1)
    if slices > 1 or (devices[0].platform == "tpu" and _slices(devices) > 1):
        grid = _grid_of_slices(slices, tuple(sizes.values()), devices)
        return Mesh(grid, (SLICES, *AXES), axis_types=(AxisType.Auto,) * (1 + len(AXES)))
    shape, axis_types = tuple(sizes.values()), (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
    except NotImplementedError:
        # Sizes that are no products of whole axes of the torus, such as 2 x 32 on 4 x 4 x 4.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=axis_types)


def row_axes(mesh: Mesh | jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """The axes over which the rows of a batch are split, outermost first."""
    return tuple(name for name in (SLICES, "data", "fsdp") if name in mesh.shape)


def _grid_of_slices(slices: int, shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices [slices, *shape]: each slice laid out along its own fast network."""
    found = _slices(devices)
    if found == 1 and devices[0].platform != "tpu":
        # CPUs and GPUs do not say what a slice is: blocks of neighbours, which on several hosts are whole hosts.
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        return np.asarray(ordered, object).reshape(slices, *shape)
    if found != slices:
        raise HypenetError(
            f"mesh axis {SLICES!r} has size {slices} but the devices form {found} slices; make it {found}"
        )
    sizes = ((1, *shape), (slices, *(1 for _ in shape)))
    try:
        grid = mesh_utils.create_hybrid_device_mesh(*sizes, devices)
    except NotImplementedError:
        # As for one slice: sizes that are no products of whole axes of the torus.
        grid = mesh_utils.create_hybrid_device_mesh(*sizes, devices, allow_split_physical_axes=True)
    return grid.reshape(slices, *shape)


def _slices(devices: Sequence[jax.Device]) -> int:
    """How many slices the devices form."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def check_compute_dtype(dtype: str) -> None:
    """Refuses bfloat16 on a CPU, where XLA has no bfloat16 products with float32 results (jax 0.10 to 0.12)."""
    if dtype == "bfloat16" and jax.default_backend() == "cpu":
        raise HypenetError("dtype is 'bfloat16' but the devices are CPUs, which train in float32; set dtype='float32'")
