"""The plan's and the scaling run's pages: a table and figures, as one HTML file that stands alone."""

from __future__ import annotations

import html
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.report_axes import STYLE, svg
from hypenet_jax.evals.report_style import CSS, INK, MODEL_COLOURS, MUTED, OTHER_COLOURS
from hypenet_jax.plan.places import PLAN, SCALING, Output
from hypenet_jax.plan.table import COLUMNS, GIB, rows

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise HypenetError("the plan is drawn with matplotlib, which is missing; install it") from error

_PARTS = {"parameters": "#5a7fa8", "optimizer": "#33476b", "teacher": "#f2c14e", "cache": "#009e73", "batch": MUTED}


def write_plan(records: Sequence[dict[str, Any]], directory: pathlib.Path) -> pathlib.Path:
    """DIR/plan.html: memory and time of every record, and the table."""
    compiled = [record for record in records if "refused" not in record]
    figures = [memory_bars(compiled), time_bars(compiled)]
    about = f"Compiled for machines that are not here, with JAX {jax.__version__}. Times are work over peak rates."
    return page(PLAN, directory, about, [COLUMNS, *rows(records)], [f for f in figures if f])


def write_scaling(
    records: Sequence[dict[str, Any]], table: Sequence[Sequence[str]], directory: pathlib.Path
) -> pathlib.Path:
    """DIR/scaling.html: throughput against devices with the ideal line, the parts of a step, and the table."""
    one = records[0]
    about = f"{one['stage']} on {one['device']}, JAX {jax.__version__}, random weights and tokens. Medians of steps."
    return page(SCALING, directory, about, table, [throughput(records), step_parts(records)])


def throughput(records: Sequence[dict[str, Any]]) -> str:
    """Tokens a second by devices; the line is the smallest mesh's, multiplied."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.6, 3.2), layout="constrained")
        axes = figure.subplots()
        base = min(records, key=lambda record: record["devices"])
        counts = sorted({record["devices"] for record in records})
        ideal = [base["tokens_per_second"] * count / base["devices"] for count in counts]
        axes.plot(counts, ideal, color=MUTED, lw=1, ls=(0, (4, 3)), label="ideal")
        for record in records:
            axes.plot(record["devices"], record["tokens_per_second"], "o", color=MODEL_COLOURS["student"])
            spot = (record["devices"], record["tokens_per_second"])
            axes.annotate(mesh_name(record), spot, (5, -3), textcoords="offset points", fontsize=8)
        axes.set_xticks(counts)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("devices")
        axes.set_ylabel("tokens/s")
        axes.legend()
        return svg(figure, "throughput")


def step_parts(records: Sequence[dict[str, Any]]) -> str:
    """Milliseconds of a step in compute, collectives and input."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _horizontal(len(records))
        colours = {
            "compute": MODEL_COLOURS["student"],
            "collective": MODEL_COLOURS["teacher"],
            "input": OTHER_COLOURS[0],
        }
        for place, record in enumerate(records):
            left = 0.0
            for name, colour in colours.items():
                value = record[f"{name}_seconds"] * 1e3
                axes.barh(place, value, left=left, color=colour, height=0.7, label=name if not place else None)
                left += value
        axes.set_yticks(range(len(records)), [mesh_name(record) for record in records])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("ms a step and device")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return svg(figure, "step-parts")


def mesh_name(record: dict[str, Any]) -> str:
    """A record's mesh, axes of size 1 left out."""
    return ",".join(f"{name}={size}" for name, size in record["mesh"].items() if size != 1) or "one device"


def memory_bars(records: Sequence[dict[str, Any]]) -> str:
    """Memory of a chip by part, one bar a record, against what the chip has."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _horizontal(len(records))
        for place, record in enumerate(records):
            parts = dict(record["parts_bytes"])
            parts |= {"temporaries": record.get("temporary_bytes", 0.0), "program": record.get("code_bytes", 0.0)}
            left = 0.0
            for name, size in parts.items():
                colour = _PARTS.get(name) or (MODEL_COLOURS["student"] if name == "temporaries" else "#c6cdd8")
                label = name if name not in axes.get_legend_handles_labels()[1] else None
                axes.barh(place, size / GIB, left=left, color=colour, height=0.7, label=label)
                left += size / GIB
            if not record["fits"]:
                axes.annotate("does not fit", (left, place), (4, 0), textcoords="offset points", va="center", color=INK)
            if record["memory_bytes"]:
                limit = record["memory_bytes"] / GIB
                axes.plot([limit, limit], [place - 0.45, place + 0.45], color=INK, lw=1.6)
        _finish(axes, records, "GiB a chip; the line is what it has")
        return svg(figure, "memory")


def time_bars(records: Sequence[dict[str, Any]]) -> str | None:
    """Milliseconds of a step at peak rates: compute, memory, and each network axis side by side."""
    timed = [record for record in records if "seconds" in record]
    if not timed:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _horizontal(len(timed))
        for place, record in enumerate(timed):
            seconds = record["seconds"]
            network = {f"network {axis}": s for axis, s in seconds["network"].items()}
            shares = {"compute": seconds["compute"], "memory": seconds["memory"], **network}
            height = 0.76 / len(shares)
            for i, (name, value) in enumerate(shares.items()):
                colour = {"compute": MODEL_COLOURS["student"], "memory": MODEL_COLOURS["teacher"]}.get(name)
                colour = colour or OTHER_COLOURS[(len(name) + sum(map(ord, name))) % len(OTHER_COLOURS)]
                label = name if name not in axes.get_legend_handles_labels()[1] else None
                axes.barh(place - 0.38 + (i + 0.5) * height, value * 1e3, color=colour, height=height, label=label)
        _finish(axes, timed, "ms a step at peak rates")
        return svg(figure, "time")


def page(
    output: Output, directory: pathlib.Path, about: str, table: Sequence[Sequence[str]], figures: Sequence[str]
) -> pathlib.Path:
    """Write the page beside its place and move it there."""
    path = directory / output.page
    head, *body = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in table]
    lines = "".join(f"<tr>{line}</tr>" for line in body)
    text = (
        f"{output.start}<style>{CSS}</style>"
        f"<header><h1>{output.title}</h1><p class=lede>{html.escape(about)}</p></header>"
        + "".join(f"<figure>{figure}</figure>" for figure in figures)
        + f"<table><thead><tr>{head.replace('td>', 'th>')}</tr></thead><tbody>{lines}</tbody></table>"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
    return path


def _horizontal(count: int) -> tuple[Any, Any]:
    figure = Figure(figsize=(10.8, 0.42 * count + 1.1), layout="constrained")
    return figure, figure.subplots()


def _finish(axes: Any, records: Sequence[dict[str, Any]], label: str) -> None:
    names = []
    for record in records:
        names.append(f"{record['machine']}  {mesh_name(record)}  {record['stage']}")
    axes.set_yticks(range(len(records)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
