"""The recurrence on a GPU by kernels in Triton's own language: gpu.py without Pallas, whose Triton lowering is to end.

jax-triton and Triton are an extra, and are imported when this backend is asked for or judged.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.compat import compute_capability, vary, varying_axes
from kernels_pallas.dispatch import Backend
from kernels_pallas.lightning import gpu
from kernels_pallas.lightning.gpu_kernels import Layout, Tiles
from kernels_pallas.lightning.marks import Marks
from kernels_pallas.lightning.recurrence import Passes, backend_function


class Shape(NamedTuple):
    """What a kernel is compiled for beside its layout and tiles."""

    heads: int
    keys: int  # width of q and k
    values: int  # width of v
    marked: bool  # the tables come from marks
    lag_rows: bool  # each row has lags of its own
    document_rows: bool  # each row has documents of its own


def scan(layout: Layout, tiles: Tiles, rates_H, marks: Marks | tuple[()], q, k, v, starts, out_dtype) -> Any:
    """`gpu_kernels.scan`."""
    batch, length, heads, keys = k.shape
    values = v.shape[-1]
    return call(
        "scan",
        (batch, layout.segments, heads * (values // tiles.columns)),
        [((batch, length, heads, values), out_dtype), ((batch, heads, keys, values), jnp.float32)],
        (rates_H, *_operands(marks, rates_H), q, k, v, starts),
        "lightning_scan" + "_reversed" * layout.reverse,
        tiles.warps,
        tiles.stages,
        layout=layout,
        tiles=tiles,
        shape=_shape(marks, heads, keys, values),
    )


def local_states(layout: Layout, tiles: Tiles, rates_H, skip_BPH, marks: Marks | tuple[()], k, v) -> jax.Array:
    """`gpu_kernels.local_states`."""
    batch, _, heads, keys = k.shape
    values = v.shape[-1]
    (local,) = call(
        "local_states",
        (batch, layout.steps, heads * (values // tiles.columns)),
        [((batch, layout.steps, heads, keys, values), jnp.float32)],
        (rates_H, skip_BPH, *_operands(marks, rates_H), k, v),
        "lightning_states" + "_reversed" * layout.reverse,
        tiles.warps,
        tiles.stages,
        layout=layout,
        tiles=tiles,
        shape=_shape(marks, heads, keys, values),
    )
    return local


def joined_states(layout: Layout, local, live_BPH, keep_BPH, start) -> jax.Array:
    """`gpu_kernels.joined_states`."""
    batch, _, heads, keys, values = local.shape
    size = keys * values
    block = min(size, 1024)
    (joined,) = call(
        "joined_states",
        (batch, heads, size // block),
        [((batch, layout.segments, heads, keys, values), jnp.float32)],
        (local, live_BPH.astype(jnp.int32), keep_BPH, start),
        "lightning_join",
        4,
        2,
        layout=layout,
        size=size,
        block=block,
    )
    return joined


KERNELS = gpu.Kernels(local_states, joined_states, scan)
forward = functools.partial(gpu.forward, kernels=KERNELS)
backward = functools.partial(gpu.backward, kernels=KERNELS)


def _shape(marks: Marks | tuple[()], heads: int, keys: int, values: int) -> Shape:
    if not marks:
        return Shape(heads, keys, values, False, False, False)
    return Shape(heads, keys, values, True, marks.lag_bhNC.shape[0] > 1, marks.document_bNC.shape[0] > 1)


def _operands(marks: Marks | tuple[()], rates_H):
    # A kernel has as many pointers with marks as without; those in their place are not read.
    return marks or (rates_H, rates_H, rates_H)


def call(kernel: str, grid, results, operands, name: str, warps: int, stages: int, **constants: Any) -> list[jax.Array]:
    """Launch a kernel of triton_kernels.py on contiguous arrays; `results` are the shapes and dtypes of its outputs."""
    triton_call = import_jax_triton().triton_call
    from kernels_pallas.lightning import triton_kernels

    major, minor = compute_capability()
    outputs = triton_call(
        *operands,
        kernel=getattr(triton_kernels, kernel),
        grid=grid,
        name=name,
        num_warps=warps,
        num_stages=stages,
        compute_capability=10 * major + minor,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results],
        **constants,
    )
    # jax-triton knows nothing of the mesh axes that values vary over within shard_map.
    axes: frozenset[str] = frozenset().union(*(varying_axes(x) for x in operands))
    return [vary(x, axes) for x in outputs]


@functools.cache
def import_jax_triton():
    """jax_triton. ImportError where it is not installed or not for this machine."""
    kept = os.environ.get("TRITON_CACHE_DIR")
    try:
        import jax_triton
    finally:
        # The import changes this process's own Triton: with "" for a cache it compiles nothing.
        os.environ.pop("TRITON_CACHE_DIR", None)
        if kept is not None:
            os.environ["TRITON_CACHE_DIR"] = kept
    return jax_triton


def _refuses(*, q_BTHK, k_BTHK, v_BTHV) -> str | None:
    if reason := gpu.refuses(q_BTHK=q_BTHK, k_BTHK=k_BTHK, v_BTHV=v_BTHV):
        return reason
    for package in ("triton", "jax_triton"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install 'hypenet_jax[triton]')"
    try:
        import_jax_triton()
    except ImportError as error:
        return f"jax_triton cannot be imported ({str(error).splitlines()[0]})"
    return None


BACKEND = Backend("jax-triton", backend_function(Passes(forward, backward)), _refuses)
