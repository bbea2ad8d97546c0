"""Read the text of a compiled program: computations, instructions, and how often each runs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_HEADER = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result; `memory` is the number of its memory space, 0 the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    memory: int

    @property
    def size(self) -> float:
        """Bytes without padding."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits[0]) if digits else 0)
        return math.prod(self.dims) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str  # the operands' text and the attributes
    root: bool

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute such as `body=%name` names."""
        found = re.search(rf"\b{name}=%([\w.\-]+)", self.rest)
        return found[1] if found else None


class Program:
    """A compiled program: `computations` by name, each a dict of instructions by name; `entry` is where it starts;
    `partitions`: how many devices run it together, 0 where it does not say. Of several TPU slices it is that of one."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        noted = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text)
        self.partitions = int(noted[1]) if noted else 0
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.startswith("  ") and " = " in line:
                instruction = _instruction(line)
                if instruction is not None:
                    current[instruction.name] = instruction
            elif header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry

    def runs(self) -> dict[str, float]:
        """How often each computation that is run by itself is run: loop bodies as often as they turn; no fusions."""
        counts: dict[str, float] = {}
        waiting = [(self.entry, 1.0)]
        while waiting:
            name, times = waiting.pop()
            counts[name] = counts.get(name, 0.0) + times
            for instruction in self.computations[name].values():
                for called, turns in self._called(name, instruction):
                    waiting.append((called, times * turns))
        return counts

    def _called(self, where: str, instruction: Instruction) -> Iterator[tuple[str, float]]:
        if instruction.opcode == "while":
            turns = self.turns(where, instruction)
            for name in ("body", "condition"):
                yield str(instruction.attribute(name)), turns
        elif instruction.opcode in ("call", "async-start"):
            for name in ("to_apply", "calls"):
                if called := instruction.attribute(name):
                    yield called, 1.0
        elif instruction.opcode == "conditional":
            listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
            pair = [instruction.attribute(f"{word}_computation") for word in ("true", "false")]
            for called in _NAME.findall(listed[1]) if listed else [name for name in pair if name]:
                yield called, 1.0

    def turns(self, where: str, loop: Instruction) -> float:
        """How often a while loop turns: as the compiler noted it, or by its counter; 1 where neither can be read."""
        if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
            return float(noted[1])
        condition = self.computations[str(loop.attribute("condition"))]
        body = self.computations[str(loop.attribute("body"))]
        root = next(i for i in condition.values() if i.root)
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return 1.0
        counter, limit = (condition[name] for name in root.operands)
        place = re.search(r"index=(\d+)", counter.rest)
        last = _constant(limit)
        if place is None or last is None:
            return 1.0
        first = self._start(where, loop, int(place[1]))
        return max(1.0, math.ceil((last - first) / self._stride(body, int(place[1]))))

    def _start(self, where: str, loop: Instruction, place: int) -> int:
        carried = self.computations[where].get(loop.operands[0])
        if carried is None or carried.opcode != "tuple":
            return 0
        value = self.computations[where].get(carried.operands[place])
        return (_constant(value) if value is not None else None) or 0

    def _stride(self, body: dict[str, Instruction], place: int) -> int:
        root = next(i for i in body.values() if i.root)
        step = body.get(root.operands[place]) if root.opcode == "tuple" else None
        if step is None or step.opcode != "add":
            return 1
        values = [_constant(body[name]) for name in step.operands if name in body]
        return next((value for value in values if value), 1)


def _instruction(line: str) -> Instruction | None:
    left, _, right = line.strip().partition(" = ")
    end = _closing(right) + 1 if right.startswith("(") else right.find(" ")
    shape, call = right[:end], right[end:].lstrip()
    opcode, parenthesis, rest = call.partition("(")
    if not parenthesis:
        return None
    inside = rest[: _closing("(" + rest) - 1]
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"),
        opcode=opcode,
        arrays=tuple(_array(*found) for found in _ARRAY.findall(shape)),
        operands=tuple(_NAME.findall(inside)),
        rest=rest,
        root=left.startswith("ROOT "),
    )


def _array(dtype: str, dims: str, layout: str) -> Array:
    space = re.search(r"S\((\d+)\)", layout)
    return Array(dtype, tuple(int(n) for n in dims.split(",") if n), int(space[1]) if space else 0)


def _closing(text: str) -> int:
    """Where the parenthesis that the text starts with closes."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(text)


def _constant(instruction: Instruction) -> int | None:
    value = re.match(r"(-?\d+)\)", instruction.rest) if instruction.opcode == "constant" else None
    return int(value[1]) if value else None
