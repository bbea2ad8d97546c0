"""What a compiled program sends between devices: kind, bytes, mesh axis, and how often."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from hypenet_jax.parallel.mesh import SLICES
from hypenet_jax.plan.hlo import Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# A program of several TPU slices hands what crosses them to its host, whose runtime is told what to make of it.
_BETWEEN_SLICES = {kind.upper().replace("-", "_"): kind for kind in KINDS[:-1]} | {"ONE_TO_ONE": "collective-permute"}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Alike collectives of one program.

    kind: one of KINDS. axes: mesh axes along which its devices lie; () where a device talks to itself only.
    devices: how many take part. size: bytes of the whole array on one device: what a gather gives, what a reduction is
    given, what a permutation hands on. count: how often a step does it.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    size: float
    count: float

    @property
    def sent(self) -> float:
        """Bytes that a device must send in a step, over the best of rings."""
        share = (self.devices - 1) / self.devices
        once = {"all-reduce": 2 * share, "collective-permute": 1.0 if self.devices > 1 else 0.0}.get(self.kind, share)
        return once * self.size * self.count


def collectives(program: Program, mesh_shape: dict[str, int]) -> list[Collective]:
    """Every collective of a program, alike ones together, the largest senders first.

    `mesh_shape`: axis name -> size of the mesh it was compiled for, whose devices in their order are its partitions.
    The TPU compiler hides a collective behind other work by splitting it into several fused parts, each of which still
    shows the whole; those parts share a chain, and one of them counts.
    """
    runs = program.runs()
    slices = mesh_shape.get(SLICES, 1)
    if program.partitions and program.partitions * slices == math.prod(mesh_shape.values()):
        mesh_shape = {name: size for name, size in mesh_shape.items() if name != SLICES}
    found: dict[Any, float] = {}
    chains: dict[Any, tuple[Any, float]] = {}
    for where, times in runs.items():
        for instruction in program.computations[where].values():
            fused = instruction.attribute("calls") if instruction.opcode == "fusion" else None
            for inner in program.computations[fused].values() if fused else (instruction,):
                if key := _between_slices(inner, program.computations[where], slices):
                    found[key] = found.get(key, 0.0) + times
                kind = inner.opcode.removesuffix("-start")
                if kind not in KINDS:
                    continue
                if fused and "all-reduce-scatter" in fused:
                    kind = "reduce-scatter"
                axes, devices = _axes(_groups(inner, mesh_shape), mesh_shape)
                key = (kind, axes, devices, _size(kind, inner, program.computations[fused or where]))
                if "chain_id=" in inner.rest:
                    part = (kind, *re.findall(r"(?:channel_id=|chain_id=\")(\d+)", inner.rest))
                    # Some parts run in loops of the work that hides them: the one that starts it runs least.
                    chains[part] = min(chains.get(part, (key, times)), (key, times), key=lambda one: one[1])
                else:
                    found[key] = found.get(key, 0.0) + times
    for key, times in chains.values():
        found[key] = found.get(key, 0.0) + times
    alike = [Collective(kind, axes, devices, size, n) for (kind, axes, devices, size), n in found.items()]
    listed = [one for one in alike if one.devices > 1]
    return sorted(listed, key=lambda one: -one.sent)


def _between_slices(instruction: Instruction, around: dict[str, Instruction], slices: int) -> Any:
    """The collective, as the key (kind, axes, devices, bytes), that begins with this sending; None for all else."""
    told = re.search(r'megascale_transfer_type="(\w+)"', instruction.rest) if instruction.opcode == "send" else None
    if told is None:
        return None
    kind = _BETWEEN_SLICES.get(told[1], "collective-permute")
    size = _size("send", instruction, around)
    return kind, (SLICES,), slices, size * slices if kind == "all-gather" else size


def _size(kind: str, instruction: Instruction, around: dict[str, Instruction]) -> float:
    """Bytes of the whole array: a gather's results, the operands of the others."""
    operands = sum(array.size for name in instruction.operands if name in around for array in around[name].arrays)
    if kind != "all-gather":
        return operands
    results = sum(array.size for array in instruction.arrays)
    # A started gather's result is the pair of what it was given and what it will give.
    return results - operands if instruction.opcode.endswith("-start") else results


def _groups(instruction: Instruction, mesh_shape: dict[str, int]) -> np.ndarray:
    """The devices [groups, devices a group] that work together; a permutation's are its pairs."""
    total = math.prod(mesh_shape.values())
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.rest):
        return np.asarray([[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])])
    text = instruction.rest
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", text):
        return np.asarray([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? ?\{([^}]*)\}", text):
        return _named(named[1], named[2], named[3])
    return np.arange(total).reshape(1, total)


def _named(axes_text: str, ids_text: str | None, chosen_text: str) -> np.ndarray:
    """Groups written as axes of a mesh of the compiler's own, maybe parts of axes: 'axis_0':(2)4."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes_text)}
    total = math.prod(sizes.values())
    ids = np.arange(total)
    if ids_text and (iota := re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids_text)):
        ids = _iota(iota[1], iota[2])
    shape: list[int] = []
    chosen: list[int] = []
    parts = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen_text)}
    for name, size in sizes.items():
        if name in parts and parts[name][1]:
            before, part = (int(n) for n in parts[name])
            chosen.append(len(shape) + 1)
            shape += [before, part, size // (before * part)]
        else:
            if name in parts:
                chosen.append(len(shape))
            shape.append(size)
    grid = np.moveaxis(ids.reshape(shape), chosen, range(-len(chosen), 0))
    return grid.reshape(-1, math.prod(shape[i] for i in chosen))


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    shape = _numbers(dims)
    grid = np.arange(math.prod(shape)).reshape(shape)
    return (grid.transpose(_numbers(permutation)) if permutation else grid).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _axes(groups: np.ndarray, mesh_shape: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which the devices of a group differ, and how many work together."""
    places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    axes = tuple(name for name, yes in zip(mesh_shape, differ, strict=True) if yes)
    # Pairs of a permutation are a ring over the whole axis.
    members = groups.shape[1] if groups.shape[1] != 2 else max(2, _ring(groups))
    return axes, members if axes else 1


def _ring(pairs: np.ndarray) -> int:
    """How many devices the longest chain of pairs joins; 2 for groups that are two devices each."""
    following = {int(source): int(target) for source, target in pairs}
    if len(following) != len(pairs) or not set(following) & set(following.values()):
        return 2
    longest = 2
    for start in following:
        length, at = 1, following[start]
        while at in following and at != start and length <= len(following):
            length, at = length + 1, following[at]
        longest = max(longest, length + (at != start))
    return longest


def total_sent(found: Sequence[Collective]) -> dict[str, float]:
    """Bytes that a device sends in a step by mesh axes, "fsdp" or "data+fsdp"."""
    sent: dict[str, float] = {}
    for one in found:
        name = "+".join(one.axes)
        sent[name] = sent.get(name, 0.0) + one.sent
    return sent
