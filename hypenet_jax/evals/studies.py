"""What a study of recipes shows: means over seeds with their intervals, differences, and tokens to reach a loss."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hypenet_jax.evals.intervals import student_t, wilson_of_seeds

# What is measured in each stage of a cell, and whether the tokens to reach a level of it are compared.
MEASURES = {"align": ("mse",), "distill": ("kl", "nll")}
COMPARED = ("mse", "kl")


def result(name: str, question: str, variants: Sequence[dict[str, Any]], cells: Sequence[dict]) -> dict[str, Any]:
    """{"study", "question", "variants", "seeds", "cells", "summary"} from the cells of `hypenet ablate`.

    variants: {"name", "label", "against"}. A cell: {"settings": {"variant": {"name"}, "seed", ..}, "align", "distill":
    curves of {"tokens", measures}, "needles", "seconds"}.
    """
    by_variant = {v["name"]: _by_seed(cells, v["name"]) for v in variants}
    summary = []
    for variant in variants:
        own, other = by_variant[variant["name"]], by_variant.get(variant["against"] or "", {})
        row: dict[str, Any] = {"name": variant["name"], "seeds": len(own), "final": {}, "difference": {}, "tokens": {}}
        for stage, measures in MEASURES.items():
            for measure in measures:
                row |= _summed(row, own, other, stage, measure)
        row["needles"] = _pooled(own)
        row["diverged"] = sum(1 for cell in own.values() if cell["distill"][-1]["kl"] is None)
        summary.append(row)
    seeds = sorted({cell["settings"]["seed"] for cell in cells})
    return {"study": name, "question": question, "variants": list(variants), "seeds": seeds} | {
        "summary": summary,
        "cells": list(cells),
    }


def tokens_to(curve: Sequence[dict[str, Any]], measure: str, level: float) -> float | None:
    """Tokens at which a curve first comes down to a level, between two measurements on a line; None where never."""
    before = None
    for point in curve:
        value = point[measure]
        if value is None:
            return None
        if value <= level:
            if before is None or before[measure] == value:
                return float(point["tokens"])
            share = (before[measure] - level) / (before[measure] - value)
            return before["tokens"] + share * (point["tokens"] - before["tokens"])
        before = point
    return None


def _by_seed(cells: Sequence[dict], name: str) -> dict[int, dict]:
    return {c["settings"]["seed"]: c for c in cells if c["settings"]["variant"]["name"] == name}


def _last(cell: dict, stage: str, measure: str) -> float | None:
    return cell[stage][-1][measure] if cell[stage] else None


def _summed(row: dict, own: dict[int, dict], other: dict[int, dict], stage: str, measure: str) -> dict[str, Any]:
    """The row with this measure's final mean, its difference and the tokens ratio, as far as there are any."""
    finals = {seed: _last(cell, stage, measure) for seed, cell in own.items()}
    finite = [value for value in finals.values() if value is not None]
    if not finite:
        return row
    row["final"][measure] = student_t(finite)
    ends = {seed: _last(cell, stage, measure) for seed, cell in other.items()}
    apart = [value - end for s, value in finals.items() if value is not None and (end := ends.get(s)) is not None]
    if not apart:
        return row
    row["difference"][measure] = student_t(apart)
    both = [s for s, value in finals.items() if value is not None and ends.get(s) is not None]
    ratios = [r for s in both if (r := _ratio(own[s][stage], other[s][stage], measure)) is not None]
    # Of some seeds alone it would leave out those that never got below where they started.
    if measure in COMPARED and both and len(ratios) == len(both):
        found = student_t([math.log(ratio) for ratio in ratios])
        row["tokens"][measure] = {key: None if v is None else math.exp(v) for key, v in found.items()}
    return row


def _ratio(own: Sequence[dict], other: Sequence[dict], measure: str) -> float | None:
    """Tokens over the other's, to the level that both come down to: the worse of the two ends."""
    level = max(own[-1][measure], other[-1][measure])
    reached = [tokens_to(curve, measure, level) for curve in (own, other)]
    if reached[0] is None or reached[1] is None or min(reached[0], reached[1]) <= 0:
        return None
    return reached[0] / reached[1]


def _pooled(own: dict[int, dict]) -> list[dict[str, Any]]:
    """Needles of all seeds added up, with `wilson_of_seeds`: every cell is asked the same."""
    counts: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for cell in own.values():
        for row in cell["needles"]:
            counts[row["task"], row["length"]].append((row["correct"], row["total"]))
    rows = []
    for (task, length), cells in sorted(counts.items()):
        right, total = map(sum, zip(*cells, strict=True))
        low, high = wilson_of_seeds(cells)
        rows.append({"task": task, "length": length, "correct": right, "total": total, "low": low, "high": high})
    return rows
