"""Figures of the needle tests: accuracy by length, and heat maps of length by depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from hypenet_jax.evals.intervals import wilson
from hypenet_jax.evals.report import MODELS, TASK_ORDER, ordered
from hypenet_jax.evals.report_axes import (
    STYLE,
    above,
    by_model,
    length_axis,
    line_style,
    mark_training,
    short_length,
    svg,
)
from hypenet_jax.evals.report_style import INK, MUTED, model_colours, model_name

SCALE_COLOURS = ("#5a7fa8", "#d55e00", "#009e73", "#a05195", "#e2a72e", "#3b3b3b")


def needle_accuracy(evaluated: dict[str, Any] | None, rows: Sequence[dict[str, Any]]) -> str | None:
    """Accuracy against length, a panel a task and a line a model, with Wilson's 95% intervals."""
    rows = [r for r in rows if r["accuracy"] is not None]
    tasks = sorted({r["task"] for r in rows}, key=lambda t: ordered(t, TASK_ORDER))
    if not tasks:
        return None
    models = sorted({r["model"] for r in rows}, key=lambda m: ordered(m, MODELS))
    colours = model_colours((evaluated or {}).get("models") or models)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(5.4, min(10.8, 3.6 * len(tasks))), 3.6), layout="constrained")
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            for i, model in enumerate(models):
                line = [r for r in rows if r["task"] == task and r["model"] == model]
                if line:
                    shift = 2 ** (0.07 * (i - (len(models) - 1) / 2))
                    _accuracy_line(axes, line, shift, line_style(model, colours[model]))
            axes.set_xscale("log", base=2)
            axes.set_ylim(-3, 104)
            axes.set_title(task, pad=19)
            length_axis(axes, sorted({r["length"] for r in rows if r["task"] == task}), "length (tokens)")
            mark_training(axes, evaluated or {})
        panels[0].set_ylabel("answered (%)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=min(4, len(labels)))
        return svg(figure, "needle-accuracy")


def _accuracy_line(axes: Any, line: list[dict[str, Any]], shift: float, style: dict[str, Any]) -> None:
    x = [r["length"] * shift for r in line]
    y = [100 * r["accuracy"] for r in line]
    spread = [
        [max(0.0, 100 * (r["accuracy"] - r["low"])) for r in line],
        [max(0.0, 100 * (r["high"] - r["accuracy"])) for r in line],
    ]
    axes.errorbar(x, y, yerr=spread, elinewidth=1.0, capsize=2.2, capthick=1.0, clip_on=False, **style)


def needles_by_scale(asked: dict[str, Any] | None, fit: dict[str, Any]) -> str | None:
    """Answered needles against a, a panel a task and a line a length; unscaled dashed, the fitted a marked."""
    rows = (asked or {}).get("rows") or []
    tasks = sorted({r["task"] for r in rows}, key=lambda t: ordered(t, TASK_ORDER))
    if not tasks:
        return None
    lengths = sorted({r["length"] for r in rows})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(5.4, min(10.8, 4.6 * len(tasks))), 3.3), layout="constrained")
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            for i, length in enumerate(lengths):
                cells = [r for r in rows if (r["task"], r["length"]) == (task, length)]
                _scale_line(axes, cells, short_length(length), SCALE_COLOURS[i % len(SCALE_COLOURS)], 1.03**i)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axes.set_ylim(-3, 104)
            axes.set_title(task, pad=19)
            axes.set_xlabel("a")
            if fit.get("a") is not None:
                axes.axvline(fit["a"], lw=1, color=MUTED, ls=(0, (2, 2)))
                above(axes, fit["a"], f"a = {fit['a']:.4g}", color=INK, fontsize=8)
        panels[0].set_ylabel("answered (%)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", title="length")
        return svg(figure, "needles-by-scale")


def _scale_line(axes: Any, cells: list[dict[str, Any]], label: str, colour: str, shift: float) -> None:
    scaled = sorted((r for r in cells if r["a"] is not None), key=lambda r: r["a"])
    shares = [(r["correct"] / r["total"], *wilson(r["correct"], r["total"])) for r in scaled]
    y = [100 * share for share, _, _ in shares]
    spread = [[100 * max(0.0, s - low) for s, low, _ in shares], [100 * max(0.0, high - s) for s, _, high in shares]]
    style = {"marker": "o", "ms": 4, "lw": 1.7, "elinewidth": 0.9, "capsize": 2, "clip_on": False}
    axes.errorbar([r["a"] * shift for r in scaled], y, yerr=spread, color=colour, label=label, **style)
    for row in cells:
        if row["a"] is None:
            axes.axhline(100 * row["correct"] / row["total"], color=colour, lw=1.2, ls=(0, (4, 3)), alpha=0.8)


def needle_maps(evaluated: dict[str, Any] | None) -> str | None:
    """Heat maps of accuracy, length by depth: a row a task, a column a model."""
    models = [(m, rows) for m, rows in by_model(evaluated or {}, "niah") if rows]
    tasks = sorted({r["task"] for _, rows in models for r in rows}, key=lambda t: ordered(t, TASK_ORDER))
    if not tasks:
        return None
    lengths = sorted({r["length"] for _, rows in models for r in rows})
    depths = sorted({r["depth"] for _, rows in models for r in rows})
    colours = model_colours((evaluated or {}).get("models") or {})
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        width = min(10.8, 1.6 + 3.1 * len(models))
        figure = Figure(figsize=(width, 0.5 + 2.15 * len(tasks)), layout="constrained")
        panels = figure.subplots(len(tasks), len(models), sharex=True, sharey=True, squeeze=False)
        image: Any = None
        for row, task in zip(panels, tasks, strict=True):
            for axes, (model, rows) in zip(row, models, strict=True):
                grid, labels = depth_grid([r for r in rows if r["task"] == task], lengths, depths)
                image = _map(axes, grid, lengths, labels, evaluated or {})
                if axes.get_subplotspec().is_first_row():
                    axes.set_title(model_name(model), color=colours[model])
            row[0].set_ylabel(f"{task}\ndepth (%)")
        for axes in panels[-1]:
            axes.set_xlabel("length (tokens)")
        bar = figure.colorbar(image, ax=panels, fraction=0.025, aspect=25, pad=0.01, format="{x:.0%}")
        bar.outline.set_visible(False)
        return svg(figure, "needle-maps")


def depth_grid(
    rows: Sequence[dict[str, Any]], lengths: Sequence[int], depths: Sequence[float], bins: int = 10
) -> tuple[np.ndarray, list[str]]:
    """Accuracy [depths, lengths] (NaN: not measured) and the rows' labels.

    Few different depths keep their own rows; many (RULER's random ones) share `bins` equal bins.
    """
    exact = len(depths) <= 12
    height = len(depths) if exact else bins
    correct, total = np.zeros((2, height, len(lengths)))
    for row in rows:
        at = list(depths).index(row["depth"]) if exact else min(bins - 1, int(row["depth"] * bins / 100))
        correct[at, lengths.index(row["length"])] += row["correct"]
        total[at, lengths.index(row["length"])] += row["total"]
    grid = np.divide(correct, total, out=np.full_like(total, np.nan), where=total > 0)
    labels = [f"{d:g}" for d in depths] if exact else [f"{100 * (i + 0.5) / bins:g}" for i in range(bins)]
    return grid, labels


def _map(axes: Any, grid: np.ndarray, lengths: list[int], labels: list[str], evaluated: dict[str, Any]) -> Any:
    axes.patch.set_facecolor("#eef1f5")
    axes.patch.set_hatch("////")
    masked = np.ma.masked_invalid(grid)
    image = axes.pcolormesh(masked, cmap="YlGnBu", vmin=0, vmax=1, edgecolors="white", linewidth=0.8)
    if grid.size <= 120:
        for (i, j), value in np.ndenumerate(grid):
            if math.isfinite(value):
                colour = "white" if value > 0.55 else INK
                axes.text(j + 0.5, i + 0.5, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=7)
    axes.set_xticks(np.arange(len(lengths)) + 0.5, [short_length(n) for n in lengths])
    every = max(1, len(labels) // 5)
    axes.set_yticks(np.arange(len(labels))[::every] + 0.5, labels[::every])
    axes.set_ylim(len(labels), 0)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    trained = evaluated.get("train_length")
    within = sum(n <= trained for n in lengths) if trained else 0
    if 0 < within < len(lengths):
        axes.axvline(within, color="#d55e00", lw=1.8, ls=(0, (3, 2)), zorder=5)
    return image
