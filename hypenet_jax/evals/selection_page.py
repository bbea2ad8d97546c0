"""The page of a comparison of layer selection: table.json in, one self-contained HTML document out."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from hypenet_jax.evals import selection_plots
from hypenet_jax.evals.report import SELECTION_METHODS, TASK_ORDER, ordered
from hypenet_jax.evals.report_axes import short, short_length
from hypenet_jax.evals.report_parts import document, drawn, provenance, section, table


def page(found: dict[str, Any], mark: str) -> str:
    """The document; `mark` is a <meta> element that says who wrote it."""
    sections = (_layers(found), _needles(found), _perplexity(found), _students(found), _made(found))
    title = "Layer selection, compared"
    footer = "Written by hypenet_jax. The numbers behind this page are in table.json beside it."
    return document(title, mark, _header(found, title), sections, footer)


def _header(found: dict[str, Any], title: str) -> str:
    seeds = len(found["methods"][0]["layers"])
    stage = found["settings"]["distill"]
    tokens = short(stage["steps"] * stage["batch_size"] * stage["seq_len"])
    return (
        f'<header>\n<p class="eyebrow">hypenet_jax · comparison</p>\n<h1>{title}</h1>\n'
        f'<p class="lede">{found["keep"]} of {found["num_layers"]} layers keep attention. '
        f"{len(found['methods'])} methods with {seeds} seed{'s' * (seeds > 1)} each made {len(found['students'])} "
        f"different choices; each choice was then distilled alike, on {tokens} tokens.</p>\n</header>"
    )


def _layers(found: dict[str, Any]) -> str:
    rows = []
    for method in found["methods"]:
        chosen = "; ".join(dict.fromkeys(", ".join(map(str, layers)) or "none" for layers in method["layers"]))
        same = "–" if method["overlap"] is None else f"{method['overlap']:.0%}"
        about = f"<small>{SELECTION_METHODS[method['method']]}</small>"
        rows.append(
            [f"<b>{method['method']}</b>{about}", chosen, same, short(method["tokens"]), f"{method['seconds']:.1f}"]
        )
    note = (
        "Seconds are wall time, a mean over seeds; the first seed's include compiling. HALO, Jet-Nemotron and KL-LS "
        "share one measurement, of which each is charged what it needs; stage 1, which every student needs, is not "
        "counted. "
    )
    note += f"Overlap is the share of layers that two seeds agree on, {found['chance_overlap']:.0%} by chance."
    head = ["Method", "Layers, by seed", "Overlap", "Tokens to choose", "Seconds to choose"]
    figure = drawn(selection_plots.kept_layers(found), "Share of the seeds that keep a layer's attention.")
    return section("The choices", figure, table(head, rows), f'<p class="about">{note}</p>')


def _needles(found: dict[str, Any]) -> str:
    drawing = selection_plots.needles(found)
    if drawing is None:
        return section("Needle in a haystack", '<p class="missing"><b>Not measured:</b> no task was asked.</p>')
    measured = [(m["method"], m["accuracy"]) for m in found["methods"]] + [("teacher", found["teacher"]["accuracy"])]
    columns = sorted(
        {(row["task"], row["length"]) for _, rows in measured for row in rows},
        key=lambda column: (ordered(column[0], TASK_ORDER), column[1]),
    )
    rows = []
    for name, accuracy in measured:
        of = {(row["task"], row["length"]): row for row in accuracy}
        rows.append([f"<b>{name}</b>", *(_cell(of[column]) for column in columns)])
    head = ["Method", *(f"{escape(task)}, {short_length(length)}" for task, length in columns)]
    caption = (
        "Mean over seeds; 95% Wilson intervals of one evaluation's needles, which are the same for every student. "
        f"Students were distilled at {short_length(found['train_length'])} tokens; attention is not scaled."
    )
    return section("Needle in a haystack", drawn(drawing, caption), table(head, rows))


def _cell(row: dict[str, Any]) -> str:
    interval = f"{100 * row['low']:.0f} to {100 * row['high']:.0f}"
    return f"{100 * row['accuracy']:.0f}%<small>{interval} · {row['correct']:g}/{row['total']:g}</small>"


def _perplexity(found: dict[str, Any]) -> str:
    rows = [
        [f"<b>{m['method']}</b>", f"{m['perplexity']:.3f}", _spread(m["perplexities"]), f"{m['kl']:.4f}"]
        for m in found["methods"]
    ]
    rows.append(["<b>teacher</b>", f"{found['teacher']['perplexity']:.3f}", "", ""])
    head = ["Method", "Perplexity", "Lowest to highest seed", "KL of the last step"]
    figure = drawn(selection_plots.price(found), "A dot a seed; equal choices lie on one height.")
    length = found["settings"]["evaluate"]["perplexity_length"]
    about = f'<p class="about">Held-out documents of {length:,} tokens.</p>'
    return section("Perplexity", about, figure, table(head, rows))


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def _students(found: dict[str, Any]) -> str:
    rows = []
    for student in sorted(found["students"], key=lambda s: s["perplexity"]):
        by = [f"{c['method']} ({c['seed']})" for c in found["choices"] if c["layers"] == student["layers"]]
        layers = ", ".join(map(str, student["layers"])) or "none"
        right = sum(row["correct"] for row in student["accuracy"])
        total = sum(row["total"] for row in student["accuracy"])
        rows.append(
            [layers, f"{student['perplexity']:.3f}", f"{student['kl']:.4f}", f"{right:g} of {total:g}", ", ".join(by)]
        )
    head = ["Layers with attention", "Perplexity", "KL of the last step", "Needles, all", "Chosen by (seed)"]
    return section("Every distinct choice", table(head, rows))


def _made(found: dict[str, Any]) -> str:
    seeds = sorted({choice["seed"] for choice in found["choices"]})
    # One of its steps is the whole comparison.
    return provenance(found["run"], found["settings"], seeds, together=False)
