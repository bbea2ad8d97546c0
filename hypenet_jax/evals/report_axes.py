"""What the report's figures share: the style, the axes of lengths, and the way into the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.report import MODELS, ordered
from hypenet_jax.evals.report_style import FONT, INK, MUTED, RULE, model_name

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise HypenetError("the report is drawn with matplotlib, which is missing; install it") from error

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hypenet",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#aab4c2",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.color": "#c3cad4",
    "hatch.linewidth": 0.6,
}
_MARKERS = {"teacher": "s", "student": "o", "student_unscaled": "^"}


def short(number: float) -> str:
    """1500 -> 1.5k: decimal thousands, for steps and tokens."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def short_length(tokens: float) -> str:
    """4096 -> 4K: binary thousands where they divide, for context lengths."""
    if tokens >= 1024 and tokens % 1024 == 0:
        return f"{int(tokens) // 1024}K" if tokens < 2**20 or tokens % 2**20 else f"{int(tokens) // 2**20}M"
    return f"{tokens:g}"


def by_model(evaluated: dict[str, Any], section: str) -> list[tuple[str, list[dict[str, Any]]]]:
    models = evaluated.get("models") or {}
    return [(m, models[m].get(section) or []) for m in sorted(models, key=lambda m: ordered(m, MODELS))]


def line_style(model: str, colour: str) -> dict[str, Any]:
    dashed = {"ls": (0, (4, 2))} if model == "student_unscaled" else {}
    return {
        "color": colour,
        "marker": _MARKERS.get(model, "o"),
        "ms": 4.5,
        "lw": 1.8,
        "label": model_name(model),
    } | dashed


def length_axis(axes: Any, lengths: Sequence[int], label: str) -> None:
    # Neighbours closer than a third of an octave would write over each other.
    shown: list[int] = []
    for length in lengths:
        if not shown or length / shown[-1] > 1.3:
            shown.append(length)
    shown = shown[:: max(1, -(-len(shown) // 9))]
    axes.set_xticks(shown, [short_length(n) for n in shown])
    axes.minorticks_off()
    axes.set_xlabel(label)


def mark_training(axes: Any, evaluated: dict[str, Any]) -> None:
    trained = evaluated.get("train_length")
    low, high = axes.get_xlim()
    if trained and low <= trained <= high:
        axes.axvline(trained, color=MUTED, lw=1, ls=(0, (2, 2)), zorder=1)
        who = "student trained" if "student" in (evaluated.get("models") or {}) else "trained"
        above(axes, trained, f"{who} to {short_length(trained)}", color=MUTED, fontsize=8)


def above(axes: Any, x: float, text: str, **style: Any) -> None:
    # Over the frame, where no line can run through it.
    spot = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axes.annotate(text, (x, 1.0), (0, 3), ha="center", va="bottom", **spot, **style)


def plain_log_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_minor_formatter(NullFormatter())


def single(width: float, height: float) -> tuple[Any, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def svg(figure: Any, name: str) -> str:
    """The figure as an <svg> element that scales with its container; ids made unique, fonts those of the page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"'DejaVu Sans'(?:, sans-serif)?", FONT.replace('"', "'"), text)
    style = f'style="max-width:{100 * figure.get_figwidth():.0f}px"'
    return text.replace("<svg ", f'<svg role="img" aria-label="{name.replace("-", " ")}" {style} ', 1)
