"""The report's figures, each a function from gathered data to an inline SVG, or None where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from hypenet_jax.evals.report_axes import (
    STYLE,
    above,
    by_model,
    length_axis,
    line_style,
    mark_training,
    plain_log_ticks,
    short,
    single,
    svg,
)
from hypenet_jax.evals.report_style import ATTENTION, INK, LIGHTNING, MODEL_COLOURS, MUTED, model_colours


def loss_curve(name: str, records: Sequence[dict[str, Any]]) -> str | None:
    """A stage's loss by step: both axes logarithmic where training spans decades; raw thin, smoothed bold."""
    points = [(r["step"], r["loss"]) for r in records if isinstance(r.get("loss"), (int, float)) and r["step"] > 0]
    if not points:
        return None
    steps, losses = np.asarray(points, float).T
    logarithmic = steps[-1] / steps[0] > 50 and name != "finetune"
    with matplotlib.rc_context(STYLE):
        figure, axes = single(3.6, 2.6)
        colour = MODEL_COLOURS["student"]
        smooth = _smooth(losses, growing=logarithmic)
        shown = _shown(len(steps), logarithmic)
        if smooth is None:
            axes.plot(steps, losses, color=colour, lw=1.8, marker="o" if len(steps) < 12 else None, ms=3.5)
        else:
            axes.plot(steps[shown], losses[shown], color=colour, lw=0.7, alpha=0.35)
            axes.plot(steps[shown], smooth[shown], color=colour, lw=1.9)
        if logarithmic:
            axes.set_xscale("log")
        if losses.min() > 0 and losses.max() / losses.min() > 4:
            axes.set_yscale("log")
            plain_log_ticks(axes.yaxis)
        axes.set_xlabel("step")
        axes.xaxis.set_major_formatter(lambda x, _: short(x))
        return svg(figure, f"loss-{name}")


def layer_scores(select: dict[str, Any]) -> str | None:
    """Bars of each layer's score, the chosen in the colour of attention, over the probes that made the scores."""
    scores = [float(s) if s is not None else math.nan for s in select.get("scores") or ()]
    probes = [(name, label, mark) for name, label, mark in _PROBES if select.get(name)]
    panels = bool(scores) + bool(probes)
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.8, 2.2 * panels + 0.6), layout="constrained")
        rows = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
        if scores:
            _score_bars(rows[0], scores, set(select.get("layers") or ()))
        if probes:
            _probe_dots(rows[-1], select, probes)
        rows[-1].set_xlabel("layer")
        length = len(scores or select[probes[0][0]])
        rows[-1].set_xticks(range(length))
        rows[-1].set_xlim(-0.7, length - 0.3)
        return svg(figure, "layer-scores")


_PROBES = (("recall", "recall", "o"), ("csr", "common sense", "D"))


def _score_bars(axes: Any, scores: list[float], chosen: set[int]) -> None:
    # One outlier must not flatten the rest: bars past the cap are cut and carry their number.
    finite = np.asarray([s for s in scores if math.isfinite(s)] or [0.0])
    usual = np.median(finite[finite > 0]) if (finite > 0).any() else 1.0
    cap = max([s for s in finite if s <= 12 * usual] or [finite.max()]) * 1.12
    for layer, value in enumerate(scores):
        if not math.isfinite(value):
            continue
        colour = ATTENTION if layer in chosen else LIGHTNING
        axes.bar(layer, min(value, cap), width=0.78, color=colour)
        if value > cap:
            axes.annotate(f"{value:.3g}", (layer, cap), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.set_ylim(min(0.0, finite.min()), cap * 1.05 if cap > 0 else 1)
    axes.set_ylabel("score")


def _probe_dots(axes: Any, select: dict[str, Any], probes: list[tuple[str, str, str]]) -> None:
    for (name, label, mark), colour in zip(probes, ("#009e73", "#a05195"), strict=False):
        values = [math.nan if v is None else v for v in select[name]]
        axes.plot(range(len(values)), values, marker=mark, ms=4.5, lw=0.9, color=colour, label=label)
        whole = (select.get("teacher") or {}).get(name)
        if whole is not None:
            axes.axhline(whole, color=colour, lw=1, ls=(0, (4, 3)))
    axes.set_ylabel("accuracy")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def scale_fit(fit: dict[str, Any]) -> str | None:
    """Loss on long documents against a, the fitted a and the unscaled loss marked."""
    points = [(a, y) for a, y in zip(fit.get("grid") or (), fit.get("loss") or (), strict=False) if y is not None]
    if not points:
        return None
    grid, losses = np.asarray(points, float).T
    with matplotlib.rc_context(STYLE):
        figure, axes = single(6.6, 3.0)
        axes.plot(grid, losses, marker="o", ms=4.5, lw=1.8, color=MODEL_COLOURS["student"], label="scaled by $s_t$")
        plain, best = fit.get("loss_unscaled"), fit.get("a")
        if plain is not None:
            colour = MODEL_COLOURS["student_unscaled"]
            axes.axhline(plain, lw=1.6, ls=(0, (5, 3)), color=colour, label="unscaled")
        if best is not None:
            axes.axvline(best, lw=1, color=MUTED, ls=(0, (2, 2)))
            above(axes, best, f"a = {best:.4g}", color=INK, weight="bold", fontsize=9)
        if grid.min() > 0:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.set_xlabel("a")
        axes.set_ylabel("loss (nats per token)")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return svg(figure, "scale-fit")


def perplexity_by_position(evaluated: dict[str, Any]) -> str | None:
    """Perplexity in buckets of position, a model a line, at the buckets' middle on a doubling axis."""
    lines = [(m, rows) for m, rows in by_model(evaluated, "perplexity_by_position") if rows]
    if not lines:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = single(6.6, 3.1)
        values, colours = [], model_colours(evaluated["models"])
        for model, rows in lines:
            x = [math.sqrt(max(r["start"], r["stop"] / 4) * r["stop"]) for r in rows]
            y = [math.exp(min(r["nll"], 50.0)) if r["nll"] is not None else math.nan for r in rows]
            values += [v for v in y if math.isfinite(v)]
            axes.plot(x, y, **line_style(model, colours[model]))
        axes.set_xscale("log", base=2)
        if values and max(values) > 4 * min(values):
            axes.set_yscale("log")
            plain_log_ticks(axes.yaxis)
        edges = sorted({r["stop"] for _, rows in lines for r in rows})
        length_axis(axes, edges, "position in the document (tokens)")
        mark_training(axes, evaluated)
        axes.set_ylabel("perplexity")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return svg(figure, "perplexity")


def _shown(count: int, logarithmic: bool, most: int = 500) -> np.ndarray:
    """Indices of the points drawn: all, or about `most`, evenly spread over the axis."""
    if count <= most:
        return np.arange(count)
    spread = np.geomspace(1, count, most) - 1 if logarithmic else np.linspace(0, count - 1, most)
    return np.unique(spread.round().astype(int))


def _smooth(values: np.ndarray, growing: bool) -> np.ndarray | None:
    """A centred mean; on a logarithmic axis the window grows with the step. None for few points."""
    if len(values) < 40:
        return None
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    half = np.minimum(index // 12 if growing else len(values), len(values) // 25)
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
