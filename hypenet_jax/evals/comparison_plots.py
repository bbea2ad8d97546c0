"""The figures of a comparison: needles and loss against length, a line a variant, and the losses of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from hypenet_jax.evals.report import TASK_ORDER, ordered
from hypenet_jax.evals.report_axes import STYLE, above, length_axis, plain_log_ticks, short, short_length
from hypenet_jax.evals.report_style import MUTED

# Colour-blind safe (Okabe and Ito), in the order of the lines; further lines repeat them dashed.
COLOURS = ("#d55e00", "#e2a72e", "#a05195", "#56b4e9", "#009e73", "#6b6b6b", "#33476b")
_MARKERS = ("o", "^", "v", "D", "s", "P", "X")


def colour(line: Mapping[str, Any]) -> str:
    """A line's colour, by its place in the config."""
    return COLOURS[line["place"] % len(COLOURS)]


def against_length(found: Mapping[str, Any]) -> Figure:
    """A panel a needle task, then the loss of tokens by position: the paper's Figures 4 and 8 in one."""
    lines = found["lines"]
    tasks = sorted({row["task"] for line in lines for row in line["accuracy"]}, key=lambda t: ordered(t, TASK_ORDER))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * (len(tasks) + 1), 4.1), layout="constrained")
        panels = figure.subplots(1, len(tasks) + 1, squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=False):
            _needles(axes, lines, task)
            axes.set_title(task, pad=19)
            _trained(axes, found["train_length"])
        panels[0].set_ylabel("answered (%)")
        _losses(panels[-1], lines)
        panels[-1].set_title("Held-out text", pad=19)
        _trained(panels[-1], found["train_length"])
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
    return figure


def _needles(axes: Any, lines: Sequence[Mapping[str, Any]], task: str) -> None:
    for i, line in enumerate(lines):
        rows = [row for row in line["accuracy"] if row["task"] == task]
        # Moved apart a little: variants often stand at 0% or 100% together.
        x = np.array([row["length"] * 2 ** (0.06 * (i - (len(lines) - 1) / 2)) for row in rows])
        y = np.array([100 * row["accuracy"] for row in rows])
        spread = [[100 * max(0.0, row["accuracy"] - row["low"]) for row in rows]]
        spread += [[100 * max(0.0, row["high"] - row["accuracy"]) for row in rows]]
        axes.errorbar(x, y, yerr=spread, elinewidth=0.8, capsize=1.6, clip_on=False, **_style(line))
        if len(line["seeds"]) > 1:
            for place, row in zip(x, rows, strict=True):
                each = [100 * share for share in row["by_seed"]]
                axes.scatter([place] * len(each), each, s=7, color=colour(line), alpha=0.5, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_ylim(-3, 104)
    length_axis(axes, sorted({row["length"] for line in lines for row in line["accuracy"]}), "length (tokens)")


def _losses(axes: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    for line in lines:
        rows = [row for row in line["loss"] if row["nll"] is not None]
        x = [math.sqrt(max(row["start"], row["stop"] / 4) * row["stop"]) for row in rows]
        axes.plot(x, [row["nll"] for row in rows], **_style(line))
    axes.set_xscale("log", base=2)
    values = [row["nll"] for line in lines for row in line["loss"] if row["nll"] is not None]
    if values and max(values) > 4 * max(min(values), 1e-6):
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    length_axis(axes, sorted({row["stop"] for line in lines for row in line["loss"]}), "position (tokens)")
    axes.set_ylabel("loss (nats a token)")


def training(curves: Mapping[str, Sequence[Mapping[str, Any]]], lines: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Loss by tokens read, a line a training of the lines shown."""
    by_name = {line["name"]: line for line in lines}
    shown = [(by_name[name.rpartition("-seed")[0]], name) for name in curves if name.rpartition("-seed")[0] in by_name]
    if not any(curves[name] for _, name in shown):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        axes = figure.subplots()
        for line, name in sorted(shown, key=lambda one: (one[0]["place"], one[1])):
            learned = [record for record in curves[name] if record.get("loss") is not None]
            x, y = [record["tokens"] for record in learned], [record["loss"] for record in learned]
            axes.plot(x, y, color=colour(line), lw=1.5, label=name)
        axes.xaxis.set_major_formatter(lambda x, _: short(x))
        axes.set_xlabel("tokens read")
        axes.set_ylabel("loss (nats a token)")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _style(line: Mapping[str, Any]) -> dict[str, Any]:
    dashed = {"ls": (0, (4, 2))} if line["place"] >= len(COLOURS) else {}
    marker = _MARKERS[line["place"] % len(_MARKERS)]
    return {"color": colour(line), "marker": marker, "ms": 4, "lw": 1.5, "label": line["label"]} | dashed


def _trained(axes: Any, length: int) -> None:
    low, high = axes.get_xlim()
    if low <= length <= high:
        axes.axvline(length, color=MUTED, lw=1, ls=(0, (2, 2)), zorder=1)
        above(axes, length, f"trained to {short_length(length)}", color=MUTED, fontsize=8)
