"""What a comparison of layer selection found, as one table: methods over their seeds, with intervals."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from hypenet_jax.evals.intervals import wilson_of_seeds
from hypenet_jax.evals.report import accuracy_rows, check_ours, replace_file

MARK = '<meta name="generator" content="hypenet_jax selection">'


def overlap(layer_sets: Sequence[Sequence[int]]) -> float | None:
    """The mean share of layers that two seeds have in common, over all pairs; None for a single seed or no layer."""
    pairs = list(itertools.combinations(layer_sets, 2))
    if not pairs or not layer_sets[0]:
        return None
    return math.fsum(len(set(a) & set(b)) / len(a) for a, b in pairs) / len(pairs)


def selection_table(
    choices: Sequence[dict[str, Any]],
    students: Sequence[dict[str, Any]],
    teacher: dict[str, Any],
    *,
    settings: dict[str, Any],
    methods: Sequence[str],
    num_layers: int,
    train_length: int,
    run: dict[str, Any] | None,
) -> dict[str, Any]:
    """table.json: everything the page shows.

    choices: {"method", "seed", "layers", "tokens", "seconds"[, "scores"]}; students: {"layers", "kl", "tokens",
    "seconds", "perplexity", "niah", ..} of each distinct set of layers; teacher: {"perplexity", "niah", ..}. A method's
    row holds means over its seeds. Its needles' interval counts those of one evaluation, not of all seeds: every
    student is asked the same needles.
    """
    of = {tuple(student["layers"]): student for student in students}
    rows = []
    for method in methods:
        cells = [choice for choice in choices if choice["method"] == method]
        own = [of[tuple(cell["layers"])] for cell in cells]
        sets = [cell["layers"] for cell in cells]
        rows.append(
            {
                "method": method,
                "layers": sets,
                "kept_share": [sum(layer in layers for layers in sets) / len(sets) for layer in range(num_layers)],
                "overlap": overlap(sets),
                "tokens": _mean([cell["tokens"] for cell in cells]),
                "seconds": _mean([cell["seconds"] for cell in cells]),
                "kl": _mean([student["kl"] for student in own]),
                "perplexity": _mean([student["perplexity"] for student in own]),
                "perplexities": [student["perplexity"] for student in own],
                "accuracy": _pooled([_accuracy(student) for student in own]),
            }
        )
    keep = max((len(choice["layers"]) for choice in choices), default=0)
    return {
        "num_layers": num_layers,
        "keep": keep,
        "chance_overlap": keep / num_layers,
        "train_length": train_length,
        "settings": settings,
        "run": run,
        "methods": rows,
        "choices": list(choices),
        "students": [dict(student, accuracy=_accuracy(student)) for student in students],
        "teacher": dict(teacher, accuracy=_accuracy(teacher)),
    }


def write_selection(directory: pathlib.Path, table: dict[str, Any]) -> pathlib.Path:
    """Write table.json and index.html into a comparison's directory; the page's path.

    Raises HypenetError where index.html is somebody else's.
    """
    from hypenet_jax.evals.selection_page import page  # matplotlib is imported only where a page is drawn

    check_ours(directory / "index.html", MARK)
    replace_file(directory / "table.json", (json.dumps(table, indent=1, allow_nan=False) + "\n").encode())
    replace_file(directory / "index.html", page(table, MARK).encode())
    return directory / "index.html"


def _accuracy(measured: dict[str, Any]) -> list[dict[str, Any]]:
    rows = accuracy_rows({"models": {"model": measured}})
    return [{key: row[key] for key in row if key != "model"} for row in rows]


def _pooled(by_seed: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The mean over seeds of each task and length, with the interval of one evaluation's needles."""
    pooled = []
    for same in zip(*by_seed, strict=True):
        total, correct = same[0]["total"], _mean([row["correct"] for row in same])
        low, high = wilson_of_seeds([(row["correct"], row["total"]) for row in same])
        pooled.append(
            {"task": same[0]["task"], "length": same[0]["length"], "correct": correct, "total": total}
            | {"accuracy": correct / total, "low": low, "high": high}
        )
    return pooled


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
