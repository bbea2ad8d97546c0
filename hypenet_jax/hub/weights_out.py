"""Safetensors files written: one file, or shards with an index, one shard in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from hypenet_jax.errors import HypenetError
from hypenet_jax.hub.directory import umask
from hypenet_jax.hub.weights_in import INDEX, SINGLE

MAX_SHARD_BYTES = 4_000_000_000


def write_weights(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: np.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write every tensor of `shapes`, in their order, into `directory`.

    read: from a name to its values in any float dtype; called once a tensor, when its shard is due. A shard holds at
    most `max_shard_bytes` bytes of values, or a single tensor. One shard is "model.safetensors"; several are numbered
    and listed in an index.

    Raises:
      HypenetError: a finite value is beyond the range of `dtype`.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    files = shard_names(len(shards))
    for file, shard in zip(files, shards, strict=True):
        save_file({name: _converted(name, read(name), dtype) for name in shard}, directory / file, {"format": "pt"})
        # safetensors writes for the owner alone; others may read what the umask lets them.
        (directory / file).chmod(0o666 & ~umask())
    if len(shards) > 1:
        listed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": listed}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in their order, cut into shards of at most `max_shard_bytes` bytes (a larger tensor stands alone)."""
    if max_shard_bytes < 1:
        raise HypenetError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shard_names(count: int) -> Sequence[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _converted(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    # safetensors stores the buffer as it lies, so a transposed view must be made contiguous first.
    # Float32 and bfloat16 reach equally far, float16 does not: what it cannot hold is refused below.
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(array.astype(dtype, copy=False))
    if dtype == np.float16 and np.isinf(converted).any() and not np.isinf(array).any():
        largest = float(np.max(np.abs(array.astype(np.float32))))
        raise HypenetError(f"tensor {name} reaches {largest:g}, which float16 cannot hold; save as bfloat16 or float32")
    return converted
