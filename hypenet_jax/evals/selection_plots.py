"""Figures of a comparison of layer selection: who keeps which layer, and what the students can do."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from hypenet_jax.evals.report import TASK_ORDER, ordered
from hypenet_jax.evals.report_axes import STYLE, length_axis, short, svg
from hypenet_jax.evals.report_style import INK, MUTED

# Colour-blind safe, in the order of the methods; the teacher is grey.
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#a05195", "#e69f00", "#d55e00", "#8c6d46", "#111111")
MARKERS = "osD^vPX*"


def kept_layers(table: dict[str, Any]) -> str:
    """A row a method and a column a layer, shaded by the share of seeds that keep its attention."""
    shares = np.array([method["kept_share"] for method in table["methods"]])
    names = [method["method"] for method in table["methods"]]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(10.8, 0.9 + 0.36 * len(names)), layout="constrained")
        axes = figure.subplots()
        axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1.15, edgecolors="white", linewidth=1.4)
        for (row, layer), share in np.ndenumerate(shares):
            if share > 0:
                colour = "white" if share > 0.55 else INK
                axes.text(layer + 0.5, row + 0.5, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=7)
        axes.set_xticks(np.arange(shares.shape[1]) + 0.5, [str(layer) for layer in range(shares.shape[1])])
        axes.set_yticks(np.arange(len(names)) + 0.5, names)
        axes.set_ylim(len(names), 0)
        axes.set_xlabel("layer")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return svg(figure, "kept-layers")


def needles(table: dict[str, Any]) -> str | None:
    """Answered needles by length, a panel a task and a line a method, with Wilson's 95% intervals."""
    lines = [(m["method"], m["accuracy"]) for m in table["methods"]] + [("teacher", table["teacher"]["accuracy"])]
    tasks = sorted({row["task"] for _, rows in lines for row in rows}, key=lambda task: ordered(task, TASK_ORDER))
    if not tasks:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.8, 4.1), layout="constrained")
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            for place, (name, rows) in enumerate(lines):
                own = [row for row in rows if row["task"] == task]
                _line(axes, name, own, place, 2 ** (0.05 * (place - (len(lines) - 1) / 2)))
            axes.set_xscale("log", base=2)
            axes.set_ylim(-3, 104)
            axes.set_title(task)
            length_axis(axes, sorted({row["length"] for _, rows in lines for row in rows}), "length (tokens)")
        panels[0].set_ylabel("answered (%)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
        return svg(figure, "selection-needles")


def _line(axes: Any, name: str, rows: list[dict[str, Any]], place: int, shift: float) -> None:
    low, high = ([100 * abs(row["accuracy"] - row[end]) for row in rows] for end in ("low", "high"))
    reference = name == "teacher"
    axes.errorbar(
        [row["length"] * shift for row in rows],
        [100 * row["accuracy"] for row in rows],
        yerr=[low, high],
        color=MUTED if reference else COLOURS[place % len(COLOURS)],
        marker="x" if reference else MARKERS[place % len(MARKERS)],
        ls=(0, (4, 2)) if reference else "-",
        ms=5,
        lw=1.6,
        elinewidth=0.8,
        capsize=2,
        label=name,
        clip_on=False,
    )


def price(table: dict[str, Any]) -> str:
    """Perplexity of every student against the tokens that its choice cost; a dot a seed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3.3), layout="constrained")
        axes = figure.subplots()
        for place, method in enumerate(table["methods"]):
            own = [choice for choice in table["choices"] if choice["method"] == method["method"]]
            axes.plot(
                [choice["tokens"] for choice in own],
                method["perplexities"],
                ls="",
                marker=MARKERS[place % len(MARKERS)],
                ms=7,
                alpha=0.75,
                color=COLOURS[place % len(COLOURS)],
                label=method["method"],
            )
        axes.set_xscale("symlog", linthresh=1e4)
        axes.xaxis.set_major_formatter(lambda x, _: short(x))
        axes.set_xlabel("tokens read for the choice")
        axes.set_ylabel("perplexity")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return svg(figure, "selection-price")
