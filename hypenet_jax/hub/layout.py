"""How a stored tensor and a parameter of ours hold the same numbers: names of dimensions on both sides."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a name table.

    name: the stored name, with "{layer}" where the layer's number goes. path: the parameter's keys; a layer's
    paths begin below "layer_i". theirs, ours: dimensions in storage and in memory, e.g. "(H d) D" and "D H d".
    """

    name: str
    path: tuple[str, ...]
    theirs: str
    ours: str


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A row with its layer and sizes filled in."""

    name: str
    path: tuple[str, ...]
    theirs: str
    ours: str
    sizes: Mapping[str, int]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return shape(self.theirs, self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        return shape(self.ours, self.sizes)

    def read(self, stored: np.ndarray) -> np.ndarray:
        """A stored array in our layout (a view where that is possible)."""
        return rearrange(stored, self.theirs, self.ours, self.sizes)

    def write(self, parameter: np.ndarray) -> np.ndarray:
        """A parameter in the stored layout (a view where that is possible)."""
        return rearrange(parameter, self.ours, self.theirs, self.sizes)


def rearrange(array: np.ndarray, source: str, target: str, sizes: Mapping[str, int]) -> np.ndarray:
    """Permute, split and merge named dimensions; every name stands once on either side.

    >>> rearrange(np.zeros((6, 5)), "(H d) D", "D H d", {"H": 2, "d": 3, "D": 5}).shape
    (5, 2, 3)
    """
    names = _names(source)
    split = array.reshape([sizes[name] for name in names])
    return split.transpose([names.index(name) for name in _names(target)]).reshape(shape(target, sizes))


def shape(dimensions: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that "(H d) D" has with the given sizes."""
    groups = re.findall(r"\(([^)]*)\)|(\S+)", dimensions)
    return tuple(math.prod(sizes[name] for name in (grouped or single).split()) for grouped, single in groups)


def _names(dimensions: str) -> list[str]:
    return dimensions.replace("(", " ").replace(")", " ").split()
