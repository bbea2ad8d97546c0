"""The page of a comparison of architectures: gathered data in, one self-contained HTML document out."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib

from hypenet_jax.evals import comparison_plots
from hypenet_jax.evals.intervals import wilson
from hypenet_jax.evals.report_axes import STYLE, short, short_length, svg
from hypenet_jax.evals.report_parts import card, document, drawn, missing, provenance, section, table

# Figures 4 and 8 of arXiv 2601.22156 (500M parameters, 20B tokens at 4K): HypeNet at 64 times its training length.
_PAPER = (64, "93.5%")


def page(found: dict[str, Any], mark: str) -> str:
    """The document, from what `comparison.gather` returns; `mark` is a <meta> element that says who wrote it."""
    title = f"{found['name']}: architectures from scratch"
    parts = [part(found) for part in (_figure, _accuracy, _networks, _training, _made)]
    footer = (
        "Written by hypenet_jax. The numbers behind this page are in report.json beside it, the first figure in "
        "figure.png."
    )
    return document(title, mark, _header(found, title), parts, footer)


def picture(found: dict[str, Any]) -> bytes:
    """The first figure as PNG."""
    stream = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        comparison_plots.against_length(found).savefig(stream, format="png", dpi=160, metadata={"Software": None})
    return stream.getvalue()


def needles_at(line: Mapping[str, Any], length: int) -> tuple[int, int]:
    """(found, asked) of a line over all tasks at one length."""
    rows = [row for row in line["accuracy"] if row["length"] == length]
    return sum(row["correct"] for row in rows), sum(row["total"] for row in rows)


def _header(found: dict[str, Any], title: str) -> str:
    lines, trained = found["lines"], found["train_length"]
    longest = max(row["length"] for line in lines for row in line["accuracy"])
    seeds = sorted({seed for line in lines for seed in line["seeds"]})
    tokens = short(max(line["tokens"] for line in lines))
    lede = (
        f"{len(lines)} variants of a network of {short(max(line['parameters'] for line in lines))} parameters, each "
        f"trained from scratch on the same {tokens} tokens at a length of {trained:,} "
        f"({len(seeds)} seed{'s' if len(seeds) > 1 else ''}), tested to {longest:,}."
    )
    absent = len((found["config"] or {}).get("variants") or ()) - len(lines)
    if absent > 0:
        lede += f" {absent} further variants of the config are not measured yet."
    return (
        f'<header>\n<p class="eyebrow">hypenet_jax · comparison report · {escape(found["name"])}</p>\n'
        f'<h1>{escape(title)}</h1>\n<p class="lede">{escape(lede)}</p>\n'
        f'<div class="cards">{"".join(_cards(lines, trained, longest))}</div>\n</header>'
    )


def _cards(lines: Sequence[Mapping[str, Any]], trained: int, longest: int) -> list[str]:
    """The first line's needles within and beyond the training length, and the best of the others beside them."""
    own, others = lines[0], lines[1:]
    lengths = sorted({row["length"] for row in own["accuracy"]})
    within = [length for length in lengths if length <= trained][-1:]
    cards = []
    for length in dict.fromkeys([*within, longest]):
        times = f"{length / trained:.3g}× the training length"
        right, asked = needles_at(own, length)
        note = _sure(own, length)
        if length / trained == _PAPER[0]:
            note += f"; the paper's at this multiple, with 500M parameters: {_PAPER[1]}"
        cards.append(card(f"{own['label']}: needles at {short_length(length)} ({times})", f"{right / asked:.0%}", note))
        if others:
            best = max(others, key=lambda line: _share(line, length))
            cards.append(
                card(f"Best of the others at {short_length(length)}", f"{_share(best, length):.0%}", best["label"])
            )
    return cards


def _sure(line: Mapping[str, Any], length: int) -> str:
    """How far the seeds lie apart over all tasks at a length, or the interval of a single one."""
    rows = [row["by_seed"] for row in line["accuracy"] if row["length"] == length]
    seeds = [sum(shares) / len(shares) for shares in zip(*rows, strict=True)]
    if len(seeds) > 1:
        return f"by seed {min(seeds):.0%} to {max(seeds):.0%}"
    low, high = wilson(*needles_at(line, length))
    return f"95% interval {low:.0%} to {high:.0%}"


def _share(line: Mapping[str, Any], length: int) -> float:
    right, asked = needles_at(line, length)
    return right / asked if asked else 0.0


def _figure(found: dict[str, Any]) -> str:
    about = (
        "RULER NIAH-Single: S1 hides a number in noise, S2 a number in prose (“-like”: other prose than RULER's "
        "essays). A needle counts as found when greedy generation would begin with the answer. Bars: Wilson's 95% "
        "intervals of one seed's needles, the same for all; small dots: each seed. Loss: of tokens by their position "
        "in held-out documents "
        f"({max(line['windows'] for line in found['lines'])} of them), a mean for each doubling."
    )
    figure = svg(comparison_plots.against_length(found), "against-length")
    return section("Against context length", f'<p class="about">{escape(about)}</p>', drawn(figure, ""))


def _accuracy(found: dict[str, Any]) -> str:
    lines = found["lines"]
    lengths = sorted({row["length"] for line in lines for row in line["accuracy"]})
    tasks = list(dict.fromkeys(row["task"] for line in lines for row in line["accuracy"]))
    rows = []
    for task in tasks:
        for i, line in enumerate(lines):
            cells = {row["length"]: row for row in line["accuracy"] if row["task"] == task}
            columns = "".join(_cell(cells.get(length)) for length in lengths)
            first = f'<td class="text"><b>{escape(task)}</b></td>' if i == 0 else "<td></td>"
            group = ' class="group"' if i == 0 and task != tasks[0] else ""
            rows.append(f'<tr{group}>{first}<td class="text">{_dot(line)}</td>{columns}</tr>')
    head = '<th>Task</th><th class="text">Variant</th>' + "".join(f"<th>{short_length(n)}</th>" for n in lengths)
    return section("Needles", f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "<td>–</td>"
    tint = f"background:rgba(44,127,184,{0.3 * row['accuracy']:.3f})"
    counts = f"<small>{row['correct']:g}/{row['total']:g}</small>"
    return f'<td class="cell" style="{tint}">{row["accuracy"]:.0%}{counts}</td>'


def _networks(found: dict[str, Any]) -> str:
    rows = []
    for line in found["lines"]:
        attention = sum(mixer == "attention" for mixer in line["mixers"])
        rows.append(
            [
                _dot(line),
                f"{attention} of {len(line['mixers'])}",
                "RoPE" if line["attention_rope"] else "none",
                {True: "RoPE", False: "none", None: "–"}[line["rnn_rope"]],
                escape(", ".join(dict.fromkeys(line["scaling"]))),
                f"{line['parameters']:,}",
                f"{line['train_loss']:.3f}",
                f"{line['perplexity']:.3f}",
            ]
        )
    head = ["Variant", "Attention layers", "Positions in attention", "Positions in RNN layers", "Scaling of queries"]
    head += ["Parameters", "Last training loss", "Perplexity over all positions"]
    about = (
        "Same text in the same order, same steps and learning rates. The scaling of the queries belongs to inference: "
        "variants that differ in it alone share a training, and a is fitted by the loss on the held-out documents that "
        "the perplexity is measured on."
    )
    return section("Variants", f'<p class="about">{about}</p>', table(head, rows))


def _training(found: dict[str, Any]) -> str:
    figure = comparison_plots.training(found["curves"], found["lines"])
    if figure is None:
        return section("Training", missing("the loss", "no metrics.jsonl is there"))
    return section("Training", drawn(svg(figure, "training"), "Cross-entropy on the training text."))


def _dot(line: Mapping[str, Any]) -> str:
    return f'<span class="dot" style="--c:{comparison_plots.colour(line)}"></span>{escape(line["label"])}'


def _made(found: dict[str, Any]) -> str:
    seeds = sorted({seed for line in found["lines"] for seed in line["seeds"]})
    return provenance(found["run"], found["config"], seeds)
