"""Declaration of parameters: shape, logical axes and initialiser said once, in a nested table for Linen."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import linen as nn
from jax.nn import initializers


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One float32 parameter: its shape, a logical axis name for each dimension, and how it starts."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Any = initializers.normal(0.02)


# Where a uniform start is meant, it is torch's nn.Linear default, which the official code keeps for new gates.
def linear_default(fan_in: int):
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


ones = initializers.ones

Table = dict[str, Any]  # name -> Parameter or a nested Table


class ParameterTable(nn.Module):
    """Materialises a table as Linen parameters that carry their logical axes; calling it returns the values."""

    table: Any

    @nn.compact
    def __call__(self) -> dict:
        values: dict[str, Any] = {}
        for name, entry in self.table.items():
            if isinstance(entry, Parameter):
                boxed = nn.with_logical_partitioning(entry.init, entry.axes)
                values[name] = self.param(name, boxed, entry.shape, jax.numpy.float32)
            else:
                values[name] = ParameterTable(entry, name=name)()
        return values


def shapes(table: Table) -> dict:
    """The table as a nested dict of float32 jax.ShapeDtypeStruct."""
    return {
        name: jax.ShapeDtypeStruct(entry.shape, jax.numpy.float32) if isinstance(entry, Parameter) else shapes(entry)
        for name, entry in table.items()
    }
