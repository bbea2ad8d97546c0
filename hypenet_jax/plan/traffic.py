"""Bytes that a compiled program reads from and writes to main memory, loops counted as often as they turn."""

from __future__ import annotations

from hypenet_jax.plan.hlo import Instruction, Program

# What moves nothing by itself.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "async-start", "async-update", "async-done", "copy-done",
    "optimization-barrier",
}  # fmt: skip
_PRODUCTS = ("dot", "convolution")
_FREE_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast")


def memory_traffic(program: Program) -> tuple[float, float]:
    """The operands and results of every instruction that lie in main memory; of a slice only the slice.

    A kernel counts as reading its operands once and writing its results once. The second number is the part of it that
    is no matrix product's: kernels, norms, gates, casts, the optimizer.
    """
    total = apart = 0.0
    for name, times in program.runs().items():
        around = program.computations[name]
        for instruction in around.values():
            moved = times * _moved(program, around, instruction)
            total += moved
            apart += 0.0 if _multiplies(program, instruction) else moved
    return total, apart


def _multiplies(program: Program, one: Instruction) -> bool:
    """Whether it is a matrix product, alone or fused, or of cuBLAS."""
    if one.opcode == "custom-call":
        return '"__cublas' in one.rest
    if one.opcode != "fusion":
        return one.opcode in _PRODUCTS
    inside = program.computations[str(one.attribute("calls"))]
    return any(_multiplies(program, instruction) for instruction in inside.values())


def _moved(program: Program, around: dict[str, Instruction], one: Instruction) -> float:
    if one.opcode in _FREE or one.opcode.endswith("-done"):
        return 0.0
    if one.opcode == "custom-call" and any(f'"{call}"' in one.rest for call in _FREE_CALLS):
        return 0.0
    if one.opcode == "fusion":
        inside = program.computations[str(one.attribute("calls"))]
        return _fused(around, one, inside)
    if one.opcode in ("send", "recv"):
        # What a slice hands to its host is read once, what it gets back written once.
        return sum(array.size for array in one.arrays[:1] if array.memory == 0)
    if one.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * _main(one)
    if one.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * sum(_main(around[name]) for name in one.operands[1:] if name in around)
    if one.opcode == "copy-start":
        return sum(array.size for array in one.arrays[:2] if array.memory == 0)
    if one.opcode.endswith("-start"):
        # Its result names the operands beside what will be there when it is done; a sum's names the latter alone.
        given = sum(_main(around[name]) for name in one.operands if name in around)
        named = sum(array.size for array in one.arrays if array.memory == 0)
        return named + given if one.opcode == "all-reduce-start" else named
    return _main(one) + sum(_main(around[name]) for name in one.operands if name in around)


def _fused(around: dict[str, Instruction], one: Instruction, inside: dict[str, Instruction]) -> float:
    parameters = {int(i.rest.split(")")[0]): i.name for i in inside.values() if i.opcode == "parameter"}
    total = 0.0
    for place, name in enumerate(one.operands):
        whole = _main(around[name]) if name in around else 0.0
        uses = [i for i in inside.values() if parameters.get(place) in i.operands]
        pieces = [_piece(i, parameters.get(place), inside) for i in uses]
        sliced = sum(piece for piece in pieces if piece is not None)
        total += min(whole, sliced) if uses and None not in pieces else whole
    root = next((i for i in inside.values() if i.root), None)
    if root is not None and root.opcode in ("dynamic-update-slice", "scatter"):
        return total + sum(array.size for name in root.operands[1:2] for array in inside[name].arrays)
    return total + _main(one)


def _piece(use: Instruction, parameter: str | None, inside: dict[str, Instruction]) -> float | None:
    """What a use takes of an operand, where it takes a part."""
    if use.operands[:1] != (parameter,):
        return None
    if use.opcode in ("dynamic-slice", "gather", "slice"):
        return sum(array.size for array in use.arrays)
    if use.opcode in ("dynamic-update-slice", "scatter"):
        return sum(array.size for name in use.operands[1:2] for array in inside[name].arrays)
    return None


def _main(instruction: Instruction) -> float:
    """Bytes of a result that lie in main memory; a tuple is only a name for what others made."""
    if len(instruction.arrays) > 1 and instruction.opcode in ("parameter", "tuple", "while"):
        return 0.0
    return sum(array.size for array in instruction.arrays if array.memory == 0)
