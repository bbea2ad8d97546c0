"""The layout of activations under a mesh, told to XLA where it could choose a worse one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hypenet_jax.parallel.rules import RULES


def divided_mesh() -> AbstractMesh | None:
    """The mesh in force, if arrays are divided over it: several devices, and not already within `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    auto = all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if not mesh.empty and mesh.size > 1 and auto else None


def sequence_shards() -> int:
    """Over how many devices the mesh in force splits positions; 1 without a mesh."""
    mesh = divided_mesh()
    return 1 if mesh is None else mesh.shape.get("seq", 1)


@contextlib.contextmanager
def mesh_of(params: Any) -> Iterator[None]:
    """The mesh that the arrays lie on is in force within, so that kernels know of it; nothing is with one device."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    meshes = {
        s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh) and s.mesh.size > 1
    }
    mesh = meshes.pop() if len(meshes) == 1 else None
    if mesh is None or any(kind != AxisType.Auto for kind in mesh.axis_types):
        yield
        return
    with jax.set_mesh(mesh):
        yield


def dividing_axes(axis: str, size: int, mesh: AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that an activation's logical axis of this size is split over: of its rule those that divide it.

    A batch of one prompt is then held whole by every row of devices.
    """
    names: tuple[str, ...] = ()
    for name in RULES[axis]:
        if name in mesh.shape and size % math.prod(mesh.shape[n] for n in (*names, name)) == 0:
            names = (*names, name)
    return names


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """The same array, laid out by its logical axes (names of `rules.RULES`) under a mesh; untouched without one."""
    mesh = divided_mesh()
    if mesh is None:
        return x
    entries = (dividing_axes(axis, size, mesh) or None for axis, size in zip(axes, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))
