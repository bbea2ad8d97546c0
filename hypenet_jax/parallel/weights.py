"""A matrix on its way into a product: cast first, then gathered over fsdp; its gradient goes back already divided."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jax.typing import DTypeLike

from hypenet_jax.parallel.activations import divided_mesh, dividing_axes

# The logical axis whose mesh axes are gathered; the others of a matrix stay as the rules divide them.
GATHERED = "embed"


def gathered(weight: jax.Array, dtype: DTypeLike, *axes: str | None) -> jax.Array:
    """The weight in `dtype`, whole along `embed` under a mesh; `axes` are its logical axes. A cast without a mesh.

    Said outright, so that the masters travel in the compute dtype, one matrix at a time, and so that XLA keeps one
    gather and one product: left to itself it unrolls each product into a ring of partial ones, which at fsdp=16 made
    4 layers take 147 s to compile for a TPU.
    """
    mesh = divided_mesh()
    if mesh is None:
        return weight.astype(dtype)
    divided = _spec(mesh, weight.shape, axes)
    whole = _spec(mesh, weight.shape, tuple(None if axis == GATHERED else axis for axis in axes))
    if weight.dtype != dtype:
        weight = jax.lax.with_sharding_constraint(weight.astype(dtype), divided)
    # Without a cast nothing need be said of how it lies: a teacher that all devices hold whole is gathered from nobody.
    return _gather(divided, whole, weight)


def after(ready: jax.Array, weights: Any) -> Any:
    """The same weights, which under a mesh nobody gathers before `ready` is there.

    A gather depends on nothing else, and XLA puts what it finds no work to hide behind before all work: on two GPUs
    half of a step's gathers came before the first product, while no device had anything to do.
    """
    return weights if divided_mesh() is None else _after(ready, weights)


@jax.custom_vjp
def _after(ready: jax.Array, weights: Any) -> Any:
    return jax.lax.optimization_barrier((ready, weights))[1]


def _after_forward(ready: jax.Array, weights: Any) -> tuple[Any, jax.Array]:
    return _after(ready, weights), ready


def _after_backward(ready: jax.Array, gradient: Any) -> tuple[jax.Array, Any]:
    return jnp.zeros_like(ready), gradient


_after.defvjp(_after_forward, _after_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(divided: PartitionSpec, whole: PartitionSpec, weight: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(weight, whole))


def _gather_forward(divided: PartitionSpec, whole: PartitionSpec, weight: jax.Array) -> tuple[jax.Array, None]:
    return _gather(divided, whole, weight), None


def _gather_backward(divided: PartitionSpec, whole: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Without it the transpose would ask for the whole sum on every device: an all-reduce instead of a reduce-scatter.
    return (jax.lax.with_sharding_constraint(gradient, divided),)


_gather.defvjp(_gather_forward, _gather_backward)


def _spec(mesh: AbstractMesh, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> PartitionSpec:
    named = (() if axis is None else dividing_axes(axis, size, mesh) for axis, size in zip(axes, shape, strict=True))
    return PartitionSpec(*(names or None for names in named))
