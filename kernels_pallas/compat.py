"""Pallas across the versions of JAX that we support (0.10 to 0.12): every `pallas_call` of the package is made here.

Without compiler parameters, `pallas_call` on a GPU means Mosaic GPU in JAX 0.10 and Triton from 0.11 on; so they are
always passed. JAX has announced the end of its Triton lowering; `lightning.jax_triton` is the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton


def platform() -> str:
    """What the computation being traced will run on: "cpu", "gpu" or "tpu".

    The abstract mesh in force decides (a machine that is not here is compiled for under `jax.set_mesh` or
    `use_abstract_mesh`), then the default device, then the default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is None:
        return jax.default_backend()
    return default if isinstance(default, str) else default.platform


def undivided() -> str | None:
    """Why a kernel of ours cannot be called here, if XLA would have to divide it over a mesh; None where it need not.

    No partitioner can: within `shard_map`, where the axes are manual, every device calls it on its own part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    if any(size > 1 and kind != jax.sharding.AxisType.Manual for size, kind in axes):
        return f"no partitioner divides it over the mesh {dict(mesh.shape)}: call it within shard_map"
    return None


def struct(shape: Sequence[int], dtype: Any, operands: Sequence[jax.Array]) -> jax.ShapeDtypeStruct:
    """What a kernel gives: inside `shard_map` it varies over the mesh axes that any of its operands varies over."""
    varying: frozenset = frozenset().union(*(varying_axes(x) for x in operands))
    kind = jax.sharding.ManualAxisType(varying=varying)
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=kind)


def compute_capability() -> tuple[int, int]:
    """Of the GPU here, or Hopper's (9, 0) where there is none: then code is compiled for another machine."""
    if jax.default_backend() != "gpu":
        return 9, 0
    major, minor = jax.local_devices(backend="gpu")[0].compute_capability.split(".")
    return int(major), int(minor)


def multiprocessors() -> int:
    """Of the GPU here, or an H100's 132 where there is none: then code is compiled for another machine."""
    if jax.default_backend() != "gpu":
        return 132
    return jax.local_devices(backend="gpu")[0].core_count


def triton_call(
    kernel: Callable[..., None], *, num_warps: int, num_stages: int, interpret: bool = False, **arguments: Any
) -> Callable[..., Any]:
    """`pallas_call` through the Triton lowering; `interpret` runs it anywhere, slowly.

    Inside `shard_map`, operands are made to vary over the same mesh axes, and results do.
    """
    parameters = pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    out_shape = arguments.pop("out_shape")

    def call(*operands: Any) -> Any:
        leaves = jax.tree.leaves(operands)
        axes: frozenset[str] = frozenset().union(*(varying_axes(x) for x in leaves))
        operands = jax.tree.map(lambda x: vary(x, axes), operands)
        shapes = jax.tree.map(lambda x: struct(x.shape, x.dtype, jax.tree.leaves(operands)), out_shape)
        options = {"compiler_params": parameters, "interpret": interpret, "out_shape": shapes}
        return pl.pallas_call(kernel, **options, **arguments)(*operands)

    return call


def tpu_call(
    kernel: Callable[..., None],
    *,
    dimension_semantics: Sequence[Literal["parallel", "arbitrary"]],
    vmem_limit_bytes: int | None = None,
    interpret: Any = False,
    **arguments: Any,
) -> Callable[..., Any]:
    """`pallas_call` through Mosaic TPU; `interpret` is False, True or `pltpu.InterpretParams`."""
    parameters = pltpu.CompilerParams(dimension_semantics=dimension_semantics, vmem_limit_bytes=vmem_limit_bytes)
    return pl.pallas_call(kernel, compiler_params=parameters, interpret=interpret, **arguments)


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which a value within `shard_map` is typed as varying; none outside, or without check_vma."""
    kind = jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The same value typed as varying over `axes` too; its transpose sums over those that this adds."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
