"""Safetensors files read lazily: one file or shards with an index, one tensor at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from hypenet_jax.errors import HypenetError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FLOATS = ("F32", "F16", "BF16")


class StoredWeights:
    """The tensors of a model directory: their shapes at once, their values on demand.

    names and shapes come from the files' headers; no values are read before `read`.
    """

    def __init__(self, directory: Path, files: dict[str, Any]):
        self._directory = directory
        self._handles = files
        self._file_of = {name: file for file, handle in files.items() for name in handle.keys()}  # noqa: SIM118
        self.shapes = {name: tuple(self._slice(name).get_shape()) for name in self._file_of}

    def read(self, name: str) -> np.ndarray:
        """One tensor in its stored dtype; raises HypenetError for a dtype other than float32, float16 or bfloat16."""
        stored = self._slice(name).get_dtype()
        if stored not in _FLOATS:
            raise HypenetError(
                f"tensor {name} of {self._directory / self._file_of[name]} has the dtype {stored}; "
                "only F32, F16 and BF16 can be read"
            )
        return self._handles[self._file_of[name]].get_tensor(name)

    def _slice(self, name: str) -> Any:
        return self._handles[self._file_of[name]].get_slice(name)


@contextlib.contextmanager
def open_weights(directory: Path) -> Iterator[StoredWeights]:
    """The weights of a model directory while the context lasts.

    Raises:
      HypenetError: no weights, a missing or truncated file, or an index that disagrees with its shards.
    """
    listed = _files(directory)
    with contextlib.ExitStack() as stack:
        handles = {file: stack.enter_context(_open(directory / file)) for file in sorted(set(listed.values()))}
        handles |= {} if listed else {SINGLE: stack.enter_context(_open(directory / SINGLE))}
        for name, file in listed.items():
            if name not in handles[file].keys():  # noqa: SIM118
                raise HypenetError(f"{directory / file} lacks the tensor {name}, which {INDEX} lists; copy it again")
        yield StoredWeights(directory, handles)


def _files(directory: Path) -> dict[str, str]:
    """tensor name -> shard, from the index; empty where one file holds everything."""
    index = directory / INDEX
    if not index.exists():
        if not (directory / SINGLE).exists():
            pickled = any(directory.glob("pytorch_model*.bin"))
            remedy = "convert its pytorch_model.bin to safetensors" if pickled else "copy the weights there"
            raise HypenetError(f"{directory} has neither {SINGLE} nor {INDEX}; {remedy}")
        return {}
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise HypenetError(f"{index} has no weight_map from tensors to files; copy it again")
    for file in sorted(set(listed.values())):
        if not (directory / file).is_file():
            raise HypenetError(f"{index} names the shard {file}, which is not there; copy it again")
    return listed


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise HypenetError(f"{path} is not a whole safetensors file ({error}); copy it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises HypenetError for a missing or broken one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HypenetError(f"{path} cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise HypenetError(f"{path} holds {type(values).__name__} where a JSON object belongs; copy it again")
    return values
