"""Which logical axis of an array is split over which mesh axes: one table, checked whenever it is applied."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hypenet_jax.errors import HypenetError
from hypenet_jax.parallel.mesh import SLICES

Rules = Mapping[str, tuple[str, ...]]

# logical axis -> mesh axes; () is replicated. "dcn" counts only on a mesh of several slices.
RULES: Rules = {
    # Parameters.
    "vocab": ("tensor",),  # rows of the embedding, columns of the head; whole where it does not divide
    "embed": ("fsdp",),  # the model width: every matrix has it once, so fsdp splits every matrix
    "heads": ("tensor",),
    "kv_heads": ("tensor",),  # whole where they do not divide: few heads over many devices
    "head_dim": (),
    "mlp": ("tensor",),
    "norm": (),  # a norm's weight is too small to be worth gathering
    # Activations.
    "batch": (SLICES, "data", "fsdp"),  # fsdp splits the rows too: each device works on its own
    "length": ("seq",),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}
# Parameter axes that every device holds whole where they do not divide, instead of an error: a vocabulary of 257 bytes,
# 2 key heads over tensor=4. The kernels' callers do as much (see `sharded_kernels`).
WHOLE_IF_UNEVEN = ("vocab", "kv_heads")


def changed_rules(**changes: Sequence[str]) -> Rules:
    """RULES with other mesh axes for some logical axes, say for a teacher: `changed_rules(embed=(), mlp=("tensor",))`.

    Raises:
      HypenetError: a logical axis that the table does not have, so that nobody would use the rule.
    """
    for name in changes:
        if name not in RULES:
            raise HypenetError(f"the sharding rule {name!r} is used by nobody; the logical axes are {', '.join(RULES)}")
    return {**RULES, **{name: tuple(axes) for name, axes in changes.items()}}


# What the rules of a config may change: how one model's parameters lie. Activations always follow RULES.
PARAMETER_AXES = ("vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "norm")


def rules_of(changes: Mapping[str, Sequence[str]]) -> Rules:
    """`changed_rules` as a config gives them, for parameters alone.

    Raises:
      HypenetError: a logical axis that no parameter has.
    """
    for name in changes:
        if name not in PARAMETER_AXES:
            raise HypenetError(
                f"the sharding rule {name!r} is used by no parameter; their axes are {', '.join(PARAMETER_AXES)}"
            )
    return changed_rules(**changes)


def partition_spec(axes: Sequence[str | None], mesh: Mesh, rules: Rules = RULES, what: str = "array") -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes; None is an axis that is never split.

    Raises:
      HypenetError: a logical axis without a rule, a rule for an absent mesh axis, or two axes of the array that the
        rules split over the same mesh axis; `what` names the array in the sentence.
    """
    taken: dict[str, str] = {}
    entries: list[tuple[str, ...] | str | None] = []
    for axis in axes:
        if axis is not None and axis not in rules:
            raise HypenetError(f"{what} has the logical axis {axis!r}, for which there is no sharding rule; add one")
        names = () if axis is None else _mesh_axes(axis, mesh, rules)
        for name in names:
            if name not in mesh.shape:
                raise HypenetError(
                    f"the rule of {axis!r} splits {what} over mesh axis {name!r}; the mesh has {', '.join(mesh.shape)}"
                )
            if name in taken:
                raise HypenetError(
                    f"{what} has axes {taken[name]!r} and {axis!r} both split over mesh axis {name!r}; change one rule"
                )
            taken[name] = str(axis)
        entries.append(names if len(names) > 1 else (names[0] if names else None))
    return PartitionSpec(*entries)


def _mesh_axes(axis: str, mesh: Mesh, rules: Rules) -> tuple[str, ...]:
    return tuple(name for name in rules[axis] if name != SLICES or name in mesh.shape)


def _sharding(
    what: str, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules
) -> NamedSharding:
    if len(axes) != len(shape):
        raise HypenetError(f"{what} has shape {tuple(shape)} but {len(axes)} logical axes {axes}; give one a dimension")
    spec = partition_spec(axes, mesh, rules, what)
    entries = list(spec)
    for place, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        names = () if axis is None else _mesh_axes(axis, mesh, rules)
        if size % math.prod(mesh.shape[name] for name in names):
            if axis in WHOLE_IF_UNEVEN:
                entries[place] = None
                continue
            written = " x ".join(f"{name}={mesh.shape[name]}" for name in names)
            raise HypenetError(
                f"{what} has {size} entries along {axis!r}, which do not divide over the mesh axes {written}; "
                "choose a mesh whose sizes divide it"
            )
    return NamedSharding(mesh, PartitionSpec(*entries))


def param_shardings(axes_tree: Any, shapes_tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The NamedSharding of every parameter.

    Args:
      axes_tree: tree of tuples of logical axis names, one name (or None) a dimension.
      shapes_tree: the same tree of arrays or jax.ShapeDtypeStruct.
      mesh: see `make_mesh`.
      rules: logical axis -> mesh axes.

    Raises:
      HypenetError: trees that differ, an axis without a rule, a rule that nobody uses, two axes of one parameter on the
        same mesh axis, or a size that does not divide; the sentence names the parameter, the axis and the sizes.
    """

    def flatten(tree: Any, is_leaf: Any = None) -> tuple[dict[str, Any], Any]:
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}, structure

    axes, _ = flatten(axes_tree, is_leaf=lambda node: isinstance(node, tuple))
    shapes, structure = flatten(shapes_tree)
    for name in sorted(axes.keys() ^ shapes.keys()):
        lacks = "no logical axes" if name in shapes else "logical axes but no shape"
        raise HypenetError(f"parameter {name} has {lacks}; the two trees must name the same parameters")
    used = {axis for names in axes.values() for axis in names}
    for rule in rules:
        if rule not in used and rule not in RULES:
            there = ", ".join(sorted(axis for axis in used if axis is not None))
            raise HypenetError(f"the sharding rule {rule!r} is used by no parameter; their logical axes are {there}")
    leaves = [_sharding(f"parameter {name}", axes[name], leaf.shape, mesh, rules) for name, leaf in shapes.items()]
    return jax.tree_util.tree_unflatten(structure, leaves)


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """The sharding of a batch's arrays [B, T, ...]: rows over dcn, data and fsdp, positions over seq."""
    return NamedSharding(mesh, partition_spec(("batch", "length"), mesh, rules, "the batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
