"""The page of a study of recipes: studies/<name>/index.html beside its result.json."""

from __future__ import annotations

import json
import os
import pathlib
from html import escape
from typing import Any

import numpy as np

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.report import check_ours, replace_file
from hypenet_jax.evals.report_parts import document, drawn, provenance, section, table

COLOURS = ("#5a7fa8", "#d55e00", "#009e73", "#a05195", "#e2a72e", "#3b3b3b", "#56b4e9")
_AXES = {
    "mse": ("Alignment", "mean squared error"),
    "kl": ("Distillation: KL from the teacher", "KL (nats per token)"),
    "nll": ("Distillation: next-token loss", "loss (nats per token)"),
}
_STAGE_OF = {"mse": "align", "kl": "distill", "nll": "distill"}
_MARK = '<meta name="generator" content="hypenet_jax study">'


def write_study(directory: str | os.PathLike) -> pathlib.Path:
    """Write index.html from the directory's result.json; the page's path. It loads nothing from anywhere.

    Raises HypenetError where result.json is missing or broken, or index.html is somebody else's.
    """
    source, index = pathlib.Path(directory) / "result.json", pathlib.Path(directory) / "index.html"
    try:
        found = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise HypenetError(f"{source} does not read ({error}); run `hypenet ablate` again") from None
    check_ours(index, _MARK)
    replace_file(index, study_page(found).encode())
    return index


def study_page(found: dict[str, Any]) -> str:
    """The document, from what `studies.result` returns and what ran it."""
    title = f"Recipe study: {found['study']}"
    sections = (_curves(found), _outcome(found), _needles(found), _made(found))
    header = (
        f'<header>\n<p class="eyebrow">hypenet_jax · recipe study</p>\n<h1>{escape(title)}</h1>\n'
        f'<p class="lede">{escape(found["question"])}</p>\n</header>'
    )
    footer = "Written by hypenet_jax. The numbers behind this page are in result.json beside it."
    return document(title, _MARK, header, sections, footer)


def _curves(found: dict[str, Any]) -> str:
    count = len(found["seeds"])
    about = (
        f"On held-out text that all variants share, whatever they were trained on: {count} seeds a variant (thin), and "
        "their mean (bold). A seed chooses the text, its order and random gates; variants of one seed read the same."
    )
    caption = "Against all tokens that a run has read, alignment included."
    return section("Loss by tokens", f'<p class="about">{about}</p>', drawn(curves(found), caption))


def curves(found: dict[str, Any]) -> str:
    """An SVG of a panel for every measure that was taken: all seeds thin, their mean bold, a colour a variant."""
    import matplotlib
    from matplotlib.figure import Figure

    from hypenet_jax.evals.report_axes import STYLE, plain_log_ticks, short, svg

    measures = [m for m in _AXES if any(cell[_STAGE_OF[m]] for cell in found["cells"])]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.75 * len(measures) if len(measures) > 1 else 6, 3.7), layout="constrained")
        panels = figure.subplots(1, len(measures), squeeze=False)[0]
        for axes, measure in zip(panels, measures, strict=True):
            drawn = _panel(axes, found, measure)
            axes.set_title(_AXES[measure][0])
            axes.set_xlabel("tokens")
            axes.set_ylabel(_AXES[measure][1])
            axes.xaxis.set_major_formatter(lambda x, _: short(x))
            if drawn and min(drawn) > 0 and max(drawn) > 3 * min(drawn):
                axes.set_yscale("log")
                plain_log_ticks(axes.yaxis)
        handles, labels = panels[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
        return svg(figure, "study-curves")


def _panel(axes: Any, found: dict[str, Any], measure: str) -> list[float]:
    """Draws a measure; the values drawn."""
    drawn: list[float] = []
    for colour, variant in zip(COLOURS, found["variants"], strict=False):
        lines = []
        for cell in found["cells"]:
            if cell["settings"]["variant"]["name"] == variant["name"]:
                points = [(p["tokens"], p[measure]) for p in cell[_STAGE_OF[measure]] if p[measure] is not None]
                if points:
                    lines.append(np.asarray(points, float))
        for line in lines:
            axes.plot(*line.T, color=colour, lw=0.6, alpha=0.55)
            drawn += list(line[:, 1])
        if lines and len({len(line) for line in lines}) == 1:
            axes.plot(lines[0][:, 0], np.mean([line[:, 1] for line in lines], axis=0), color=colour, lw=1.9)
        # In the legend, also where the variant has no curve in this panel.
        axes.plot([], [], color=colour, lw=1.9, label=variant["label"])
    return drawn


def _outcome(found: dict[str, Any]) -> str:
    labels = {v["name"]: v["label"] for v in found["variants"]}
    measures = [m for m in _AXES if any(m in row["final"] for row in found["summary"])]
    head = ["Variant", *(f"{m.upper()} at the end" for m in measures)]
    head += [f"{m.upper()}: difference" for m in measures]
    head += [f"tokens to equal {m.upper()}" for m in measures if m != "nll"]
    rows = []
    for variant, row in zip(found["variants"], found["summary"], strict=True):
        beside = f"<small>against {escape(labels[variant['against']])}</small>" if variant["against"] else ""
        note = f"<small>{row['diverged']} of {row['seeds']} not finite</small>" if row["diverged"] else ""
        cells = [_estimate(row["final"].get(m), "{:.4f}") for m in measures]
        cells += [_estimate(row["difference"].get(m), "{:+.4f}") for m in measures]
        cells += [_estimate(row["tokens"].get(m), "{:.2f}×") for m in measures if m != "nll"]
        rows.append([f"{escape(variant['label'])}{beside}{note}", *cells])
    about = (
        f"Means over {len(found['seeds'])} seeds with 95% intervals by Student's t. Differences and token ratios are "
        "taken seed by seed from the variant named below each; a ratio above 1 means that many times its tokens to the "
        "loss that both reach (–: some seed is there before it trains). An interval that contains 0 (or 1×) shows no "
        "difference at this size."
    )
    return section("Outcome", f'<p class="about">{about}</p>', table(head, rows))


def _needles(found: dict[str, Any]) -> str:
    columns = sorted({(n["task"], n["length"]) for row in found["summary"] for n in row["needles"]})
    if not columns:
        return ""
    rows = []
    for variant, row in zip(found["variants"], found["summary"], strict=True):
        by_column = {(n["task"], n["length"]): n for n in row["needles"]}
        cells = []
        for column in columns:
            n = by_column.get(column)
            if n is None:
                cells.append("–")
                continue
            counts = f"<small>{n['correct']}/{n['total']}, {n['low']:.0%} to {n['high']:.0%}</small>"
            cells.append(f"{n['correct'] / n['total']:.0%}{counts}")
        rows.append([escape(variant["label"]), *cells])
    about = (
        "Asked of every finished cell, without scaling; seeds together, with Wilson's 95% intervals of one seed's "
        "needles, which are the same for all."
    )
    head = ["Variant", *(f"{task} at {length:,}" for task, length in columns)]
    return section("Needles", f'<p class="about">{about}</p>', table(head, rows))


def _made(found: dict[str, Any]) -> str:
    config = found["config"] or {}
    run = {name: found[name] for name in ("command", "device", "versions")}
    facts = {
        "Teacher": config.get("teacher", ""),
        "Layers that keep attention": ", ".join(map(str, found["layers"])) or "none",
        "Cells": ", ".join(f"{name} {value}" for name, value in (config.get("ablate") or {}).items()),
    }
    return provenance(run | {"seconds": {"all cells": found["seconds"]}}, config, found["seeds"], facts)


def _estimate(found: dict[str, float | None] | None, form: str) -> str:
    if found is None:
        return "–"
    if found["low"] is None:
        return f"{form.format(found['mean'])}<small>of one seed alone</small>"
    return f"{form.format(found['mean'])}<small>{form.format(found['low'])} to {form.format(found['high'])}</small>"
