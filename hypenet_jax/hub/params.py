"""The nested dict of parameters and the flat list of stored tensors, each checked against the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from hypenet_jax.errors import HypenetError
from hypenet_jax.hub.layout import Tensor

# Called with a parameter's path and its host array as soon as that is read; returns what the tree holds instead.
Place = Callable[[tuple[str, ...], np.ndarray], Any]

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def dtype_of(name: str) -> np.dtype:
    """The numpy dtype of "float32", "bfloat16" or "float16"; raises HypenetError for another name."""
    if name not in DTYPES:
        raise HypenetError(f"dtype is {name!r}; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def build(
    tensors: Sequence[Tensor], read: Callable[[str], np.ndarray], dtype: np.dtype, place: Place | None = None
) -> dict[str, Any]:
    """The parameter tree, read tensor by tensor: beside the tree, one tensor at a time is in memory.

    read: from a stored name to the stored array.
    """
    params: dict[str, Any] = {}
    for tensor in tensors:
        # A copy of its own: a view would keep a mapped file alive, or the whole of a larger array.
        array = np.array(tensor.read(read(tensor.name)), dtype=dtype, order="C")
        insert(params, tensor.path, array if place is None else place(tensor.path, array))
    return params


def check_stored(tensors: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise HypenetError unless the stored names and shapes are exactly those of the model."""
    wanted = {tensor.name: tensor.stored_shape for tensor in tensors}
    _check_names(list(wanted), list(shapes), where, "tensor")
    _check_shapes(wanted, shapes, where, "tensor")


def check_params(tensors: Sequence[Tensor], params: Mapping[str, Any]) -> None:
    """Raise HypenetError unless the tree has exactly the parameters of the model, in their shapes."""
    if not isinstance(params, Mapping):
        kind = type(params).__name__
        raise HypenetError(f"the parameters are of type {kind}; give the nested dict that `load` returns")
    found = {"/".join(map(str, path)): leaf for path, leaf in leaves(params)}
    for name, leaf in found.items():
        if not hasattr(leaf, "shape"):
            raise HypenetError(f"the parameter {name} is of type {type(leaf).__name__}; it must be an array")
    wanted = {"/".join(tensor.path): tensor.shape for tensor in tensors}
    got = {name: tuple(leaf.shape) for name, leaf in found.items()}
    _check_names(list(wanted), list(got), "the parameter tree", "parameter")
    _check_shapes(wanted, got, "the parameter tree", "parameter")


def leaves(params: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, array) of every leaf."""
    for name, entry in params.items():
        if isinstance(entry, Mapping):
            yield from leaves(entry, (*path, name))
        else:
            yield (*path, name), entry


def insert(params: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Put a leaf into a nested dict, making the dicts on the way."""
    for name in path[:-1]:
        params = params.setdefault(name, {})
    params[path[-1]] = value


def lookup(params: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The leaf at a path."""
    entry: Any = params
    for name in path:
        entry = entry[name]
    return entry


def _check_names(wanted: Sequence[str], got: Sequence[str], where: str, kind: str) -> None:
    present, expected = set(got), set(wanted)
    missing = [name for name in wanted if name not in present]
    if missing:
        raise HypenetError(f"{where} lacks the {kind} {_some(missing)}; its config and weights do not belong together")
    unexpected = [name for name in got if name not in expected]
    if unexpected:
        raise HypenetError(
            f"{where} holds the unexpected {kind} {_some(unexpected)}; its config and weights do not belong together"
        )


def _check_shapes(
    wanted: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]], where: str, kind: str
) -> None:
    for name, shape in wanted.items():
        if tuple(got[name]) != shape:
            raise HypenetError(
                f"{kind} {name} of {where} has the shape {tuple(got[name])}; the config asks for {shape}"
            )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
