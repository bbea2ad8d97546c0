"""What a comparison of architectures found, gathered from its work directory for the page and for report.json."""

from __future__ import annotations

import os
import pathlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hypenet_jax.config import differences
from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.intervals import wilson_of_seeds
from hypenet_jax.evals.report import TASK_ORDER, finite, metrics_records, ordered, read_object
from hypenet_jax.model.config import POSITIONS

# Settings that ask nothing of a comparison, or only how many rows go at a time.
_UNREAD = (
    "prefill_chunk",
    "row_tokens",
    "batch_tokens",
    "prompts",
    "new_tokens",
    "chat",
    "scale_lengths",
    "scale_grid",
)
_FREE = (*(f"evaluate.{name}" for name in _UNREAD), "fit_scale.batch_size")
_LABELS = {
    "hype": "HypeNet",
    "rope": "Hybrid, all RoPE",
    "nope": "Hybrid, all NoPE",
    "attention_rope": "Hybrid, RoPE in attention alone",
}


def gather(workdir: str | os.PathLike) -> dict[str, Any]:
    """Everything the page shows, JSON-able.

    {"name", "kind": "comparison", "config", "train_length", "lines", "curves", "run"}: a line for each variant of the
    config that has results, see `_line`, and its "place" there, which gives it its colour; curves {training: metrics
    records}. Counts are added up over seeds, losses are means over them. Raises HypenetError where there is no result.
    """
    directory = pathlib.Path(workdir)
    config = read_object(directory / "config.json") or {}
    settings = {name: config.get(name) for name in ("evaluate", "fit_scale")}
    lines = []
    for place, variant in enumerate(config.get("variants") or ()):
        files = [directory / "results" / f"{variant['name']}-seed{seed}.json" for seed in config["seeds"]]
        results = [r for file in files if (r := read_object(file)) is not None and is_of(r, variant, settings)]
        if results:
            lines.append(_line(variant, results) | {"place": place})
    if not lines:
        raise HypenetError(
            f"the work directory {directory} holds no result to report; run `hypenet compare-architectures` first"
        )
    # Two variants of one kind are told apart by their names alone.
    labels = [line["label"] for line in lines]
    for line in lines:
        if labels.count(line["label"]) > 1:
            line["label"] = line["name"]
    runs = sorted((directory / "runs").glob("*/metrics.jsonl"))
    return finite(
        {
            "name": directory.resolve().name,
            "kind": "comparison",
            "config": config,
            "train_length": config["train"]["seq_len"],
            "lines": lines,
            "curves": {file.parent.name: metrics_records(file) for file in runs},
            "run": read_object(directory / "run.json"),
        }
    )


def is_of(result: dict[str, Any], variant: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a result is this variant's, measured with these settings, both as JSON gives them; others do not compare.

    settings: {"evaluate", "fit_scale"} of the config. What a comparison does not read of them may differ.
    """
    before = result.get("settings")
    free = _FREE if variant["scaling"] == "fit" else (*_FREE, "fit_scale")
    return (
        isinstance(before, dict)
        and _defined(result.get("variant") or {}) == _defined(variant)
        and not differences(before, settings, free)
    )


def _defined(variant: dict[str, Any]) -> dict[str, Any]:
    """A variant without what its scaling does not read."""
    return {key: variant[key] for key in variant if key != "constant" or variant.get("scaling") == "constant"}


def label(variant: dict[str, Any]) -> str:
    """A variant as readers see it."""
    name = _LABELS[variant["position"]] if variant["hybrid"] else "Transformer, RoPE"
    if variant["scaling"] == "constant":
        return f"{name}, constant {variant['constant']:g}"
    # What the paper calls HypeNet has the scaling; of the others only what departs from its lines is said.
    scaled = variant["scaling"] == "fit"
    if name == "HypeNet":
        return name if scaled else f"{name}, unscaled"
    return f"{name}, scaled" if scaled else name


def _line(variant: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"name", "label", "seeds", "parameters", "mixers", "attention_rope", "rnn_rope", "scaling", "train_loss",
    "perplexity", "accuracy", "loss"}: accuracy rows {"task", "length", "correct", "total", "accuracy", "low", "high",
    "by_seed"} with `wilson_of_seeds`; loss rows {"start", "stop", "nll", "by_seed"}.
    """
    network = results[0]["network"]
    attention_rope, rnn_rope = POSITIONS[variant["position"]]
    return {
        "name": variant["name"],
        "label": label(variant),
        "seeds": [result["seed"] for result in results],
        "parameters": results[0]["parameters"],
        "mixers": list(network["mixers"]),
        "attention_rope": attention_rope,
        "rnn_rope": rnn_rope if variant["hybrid"] else None,
        "scaling": [_scaling(result) for result in results],
        "train_loss": _mean([result["training"]["loss"] for result in results]),
        "tokens": results[0]["training"]["tokens"],
        "perplexity": _mean([result["perplexity"] for result in results]),
        "windows": results[0]["windows"],
        "accuracy": _accuracy(results),
        "loss": _losses(results),
    }


def _scaling(result: dict[str, Any]) -> str:
    scaling = result["network"].get("logits_scaling")
    if not scaling:
        return "none"
    return f"a = {scaling['value']:.4g}" if scaling["kind"] == "hype" else f"{scaling['value']:g}"


def _accuracy(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    counts: dict[tuple[str, int], list[list[int]]] = defaultdict(lambda: [[0, 0] for _ in results])
    for i, result in enumerate(results):
        for row in result["niah"]:
            cell = counts[row["task"], row["length"]][i]
            cell[0] += row["correct"]
            cell[1] += row["total"]
    rows = []
    for (task, length), cells in sorted(counts.items(), key=lambda item: (ordered(item[0][0], TASK_ORDER), item[0][1])):
        correct, total = (sum(cell[k] for cell in cells) for k in (0, 1))
        low, high = wilson_of_seeds([(right, asked) for right, asked in cells if asked])
        rows.append(
            {"task": task, "length": length, "correct": correct, "total": total, "accuracy": correct / total}
            | {"low": low, "high": high, "by_seed": [right / asked for right, asked in cells if asked]}
        )
    return rows


def _losses(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for result in results:
        for row in result["perplexity_by_position"]:
            found[row["start"], row["stop"]].append(row["nll"])
    return [
        {"start": start, "stop": stop, "nll": _mean(values), "by_seed": values}
        for (start, stop), values in sorted(found.items())
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
