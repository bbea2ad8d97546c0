"""The report's page: gathered data in, one self-contained HTML document out."""

from __future__ import annotations

import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hypenet_jax.evals import report_needles, report_plots
from hypenet_jax.evals.report import MODELS, SELECTION_METHODS, STAGES, ordered
from hypenet_jax.evals.report_axes import short, short_length
from hypenet_jax.evals.report_parts import beside, card, clock, document, drawn, missing, provenance, section, table
from hypenet_jax.evals.report_style import ATTENTION, LIGHTNING, model_colours, model_name

_STAGE_NAMES = {
    "align": ("Alignment", "MSE between the mixers' outputs"),
    "distill": ("Distillation", "KL(teacher ‖ student), nats per token"),
    "finetune": ("Long-context finetuning", "cross-entropy, nats per token"),
    "train": ("Training", "cross-entropy, nats per token"),
}


def page(found: dict[str, Any], mark: str) -> str:
    """The document, from what `report.gather` returns; `mark` is a <meta> element that says who wrote it."""
    title = _title(found)
    sections = [_network, _training, _selection, _scaling, _perplexity, _needles, _samples, _made]
    footer = "Written by hypenet_jax. The numbers behind this page are in report.json beside it."
    return document(title, mark, _header(found, title), [part(found) for part in sections], footer)


def _title(found: dict[str, Any]) -> str:
    teacher = (found["teacher"] or {}).get("name")
    if teacher:
        return f"{pathlib.PurePath(teacher.removesuffix('.gguf')).name} → HypeNet"
    return f"{found['name']}: {'conversion to HypeNet' if _converts(found) else 'trained from scratch'}"


def _converts(found: dict[str, Any]) -> bool:
    return found["kind"] == "conversion"


def _header(found: dict[str, Any], title: str) -> str:
    mixers = (found["student"] or {}).get("mixers") or []
    kept = sum(m == "attention" for m in mixers)
    lines = []
    if mixers and kept < len(mixers):
        lines.append(
            f"{kept} of {len(mixers)} layers keep softmax attention; "
            f"the other {len(mixers) - kept} are Lightning Attention layers."
        )
    trained = _tokens_trained(found)
    seconds = sum(t or 0 for t in ((found["run"] or {}).get("seconds") or {}).values())
    if trained:
        took = f"; all steps took {clock(seconds)}" if seconds else ""
        lines.append(f"Trained on {short(trained)} tokens{took}.")
    return (
        f'<header>\n<p class="eyebrow">hypenet_jax · {found["kind"]} report · '
        f'{escape(found["name"])}</p>\n<h1>{escape(title)}</h1>\n<p class="lede">{escape(" ".join(lines))}</p>\n'
        f'<div class="cards">{"".join(_cards(found))}</div>\n</header>'
    )


def _cards(found: dict[str, Any]) -> list[str]:
    cards = []
    models = (found["eval"] or {}).get("models") or {}
    name = "student" if "student" in models else next(iter(models), "student")
    values = {m: (models.get(m) or {}).get("perplexity") for m in {name, "teacher"}}
    if values[name] is not None:
        note = f"teacher {values['teacher']:.2f}" if values.get("teacher") and name != "teacher" else ""
        cards.append(card("Perplexity, held-out documents", f"{values[name]:.2f}", note))
    else:
        cards.append(card("Perplexity, held-out documents", "–", "not measured"))
    rows = [r for r in found["accuracy"] if r["accuracy"] is not None]
    lengths = sorted({r["length"] for r in rows})
    trained = (found["eval"] or {}).get("train_length")
    for length in dict.fromkeys([n for n in lengths if not trained or n <= trained][-1:] + lengths[-1:]):
        label = f"Needles found at {short_length(length)}"
        if trained:
            times = "" if length == trained else f"{length / trained:.3g}× "
            label += f" ({times}the training length)"
        own, other = (_mean_accuracy(rows, m, length) for m in (name, "teacher"))
        if own is not None:
            note = f"teacher {other:.0%}" if other is not None and name != "teacher" else ""
            cards.append(card(label, f"{own:.0%}", note))
    fit = found["fit_scale"] or {}
    if fit.get("a"):
        gain = ""
        if fit.get("loss_unscaled") is not None and fit.get("loss"):
            gain = f"loss {min(v for v in fit['loss'] if v is not None):.3f}, unscaled {fit['loss_unscaled']:.3f}"
        cards.append(card("Fitted a of the query scaling", f"{fit['a']:.4g}", gain))
    return cards


def _network(found: dict[str, Any]) -> str:
    who = [(name, found[name]) for name in ("teacher", "student") if found[name]]
    if not who:
        return section("Network", missing("the network", "config.json and export/config.json are not there"))
    strips = "".join(
        f'<div class="who">{model_name(name if _converts(found) else "model")}</div>{_strip(facts["mixers"])}'
        for name, facts in who
        if facts.get("mixers")
    )
    key = f'<div class="key"><span style="--c:{ATTENTION}">softmax attention</span>'
    key += f'<span style="--c:{LIGHTNING}">Lightning Attention</span></div>'
    parts = [f'<div class="strips">{strips}</div>{key}' if strips else missing("the layers", "no layers chosen yet")]
    rows = []
    for fact, label in _FACTS.items():
        values = [facts.get(fact) for _, facts in who]
        if any(v is not None for v in values):
            rows.append([label, *(_fact(v) for v in values)])
    if rows:
        head = ["", *((model_name(name if _converts(found) else "model")) for name, _ in who)]
        parts.append(f'<div class="narrow">{table(head, rows)}</div>')
    return section("Network", *parts)


_FACTS = {
    "layers": "Layers",
    "width": "Width",
    "ffn": "FFN width",
    "heads": "Query heads",
    "kv_heads": "Key/value heads of attention",
    "head_dim": "Head width",
    "vocabulary": "Vocabulary",
    "tied_head": "Tied output head",
    "rope_theta": "RoPE base",
    "attention_rope": "RoPE in attention layers",
    "attention_gate": "Output gate of attention",
    "scaling": "Scaling of attention queries",
}


def _fact(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return escape(" ".join(str(v) for v in value.values()))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, int) else escape(f"{value:g}" if isinstance(value, float) else str(value))


def _strip(mixers: Sequence[str]) -> str:
    boxes = "".join(
        f'<i class="{m if m in ("attention", "lightning") else "other"}" title="layer {i}: {escape(m)}">{i}</i>'
        for i, m in enumerate(mixers)
    )
    return f'<div class="strip">{boxes}</div>'


def _training(found: dict[str, Any]) -> str:
    expected = [s for s in STAGES if s in found["stages"] or (_converts(found) and s != "train")]
    expected = expected or [s for s in STAGES if s in (found["config"] or {})]
    if not expected:
        return section("Training", missing("the loss", "no metrics.jsonl is there"))
    cells = []
    for stage in expected:
        name, unit = _STAGE_NAMES[stage]
        records = found["stages"].get(stage) or []
        drawing = report_plots.loss_curve(stage, records)
        if drawing is None:
            cells.append(f"<div><h3>{name}</h3>{missing('this stage', 'it has not run')}</div>")
            continue
        last = records[-1]
        facts = [f"loss {last['loss']:.4g} at step {last['step']:,}" if last.get("loss") is not None else ""]
        facts += [f"{short(last['tokens'])} tokens" if last.get("tokens") else ""]
        facts += [clock(last["seconds"]) if last.get("seconds") else ""]
        rates = [record["tokens_per_second"] for record in records[1:] if record.get("tokens_per_second")]
        facts += [f"{short(statistics.median(rates))} tokens/s" if rates else ""]
        caption = f"{unit}: {', '.join(f for f in facts if f)}."
        cells.append(f"<div><h3>{name}</h3><figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure></div>")
    return section("Training", f'<div class="columns">{"".join(cells)}</div>')


def _selection(found: dict[str, Any]) -> str:
    if not _converts(found):
        return ""
    select = found["select"]
    if not select:
        return section("Layer selection", missing("the layers", "select.json is not there"))
    layers = ", ".join(map(str, select.get("layers") or ())) or "none"
    about = f"Attention stays in layers {layers} (method: {escape(str(select.get('method', 'unknown')))})."
    drawing = report_plots.layer_scores(select)
    if drawing is None:
        return section("Layer selection", f'<p class="about">{about} This choice needed no scores.</p>')
    meaning = SELECTION_METHODS.get(select.get("method"))
    caption = f"Score of every layer{f': {meaning}' if meaning else ''} "
    caption += "(dark: chosen to keep attention; a number above a bar: cut off)."
    if select.get("recall") or select.get("csr"):
        caption += " Below: accuracy of the teacher with that layer alone replaced. Dashed: the unchanged teacher."
    return section("Layer selection", f'<p class="about">{about}</p>', drawn(drawing, caption))


def _scaling(found: dict[str, Any]) -> str:
    fit = found["fit_scale"]
    if not _converts(found):
        return ""
    drawing = report_plots.scale_fit(fit) if fit else None
    if not fit or drawing is None:
        return section("Query scaling", missing("the fit of a", "fit_scale.json is not there"))
    where = ""
    if fit.get("documents") and fit.get("length"):
        where = f" over {fit['documents']} held-out documents of {fit['length']:,} tokens"
    about = (
        '<p class="about">s<sub>t</sub> = ln(t + a) / ln(a) multiplies the attention queries at position t. '
        f"Loss{where} against a.</p>"
    )
    losses = [loss for loss in fit["loss"] if loss is not None]
    rows = [["Fitted a", f"{fit['a']:.4g}"]] if fit.get("a") is not None else []
    if fit.get("tolerance"):
        rows += [
            ["Best a by loss", f"{fit['best']:.4g}"],
            ["Loss given up for a smaller a, at most", f"{fit['tolerance']:g}"],
        ]
    rows += [["Lowest loss of the grid, nats per token", f"{min(losses):.4f}"]]
    if fit.get("loss_unscaled") is not None:
        rows.append(["Loss unscaled, nats per token", f"{fit['loss_unscaled']:.4f}"])
    asked = report_needles.needles_by_scale(found.get("scale_needles"), fit)
    retrieval = ""
    if asked is not None:
        caption = (
            "The same needles asked for every a, with Wilson's 95% intervals, and unscaled (dashed). The vertical line "
            "is the a that was fitted by loss."
        )
        retrieval = f"<h3>Retrieval by a</h3>{drawn(asked, caption)}"
    return section("Query scaling", about, beside(drawn(drawing, ""), table(["Fit", ""], rows)), retrieval)


def _perplexity(found: dict[str, Any]) -> str:
    models = (found["eval"] or {}).get("models") or {}
    whole = [(m, models[m].get("perplexity")) for m in sorted(models, key=lambda m: ordered(m, MODELS))]
    colours = _colours(found)
    rows = [[_dot(m, colours), f"{p:.3f}"] for m, p in whole if p is not None]
    drawing = report_plots.perplexity_by_position(found["eval"] or {})
    if not rows and drawing is None:
        return section("Perplexity", missing("perplexity", "eval.json does not hold it"))
    parts = []
    if drawing is not None:
        caption = "Perplexity of tokens by their position in held-out documents; lower is better."
        parts.append(drawn(drawing, caption))
    if rows:
        parts.append(table(["Model", "Perplexity over all"], rows))
    return section("Perplexity", beside(*parts))


def _needles(found: dict[str, Any]) -> str:
    rows = found["accuracy"]
    lines = report_needles.needle_accuracy(found["eval"], rows)
    if lines is None:
        return section("Needle in a haystack", missing("retrieval", "eval.json holds no needle tests"))
    tasks = {r["task"] for r in rows}
    about = "RULER NIAH-Single: S1 hides a number in noise, S2 a number in essays, S3 a UUID in essays."
    if any(t.endswith("-like") for t in tasks):
        about += " “-like” marks the same tests over other prose than RULER's essays."
    answered = ((found["eval"] or {}).get("settings") or {}).get("answer")
    if answered == "forced":
        about += " A needle counts as found when greedy generation would begin with the answer."
    elif answered == "generate":
        about += " A needle counts as found when the generated text contains the answer."
    parts = [f'<p class="about">{about}</p>', drawn(lines, "Answered needles by length, with Wilson's 95% intervals.")]
    parts.append(_accuracy_table(rows, _colours(found)))
    maps = report_needles.needle_maps(found["eval"])
    if maps is not None:
        caption = (
            "Share answered (in %) by length and depth of the needle; hatched: not measured. "
            "Right of the dashed line lie lengths that training did not reach."
        )
        parts += ["<h3>By depth</h3>", drawn(maps, caption)]
    return section("Needle in a haystack", *parts)


def _accuracy_table(rows: Sequence[dict[str, Any]], colours: Mapping[str, str]) -> str:
    lengths = sorted({r["length"] for r in rows})
    cells = {(r["task"], r["model"], r["length"]): r for r in rows}
    lines, previous = [], None
    for task, model in dict.fromkeys((r["task"], r["model"]) for r in rows):
        columns = "".join(_accuracy_cell(cells.get((task, model, length))) for length in lengths)
        first = f'<td class="text"><b>{escape(task)}</b></td>' if task != previous else "<td></td>"
        group = ' class="group"' if task != previous and previous is not None else ""
        lines.append(f'<tr{group}>{first}<td class="text">{_dot(model, colours)}</td>{columns}</tr>')
        previous = task
    head = '<th>Task</th><th class="text">Model</th>' + "".join(f"<th>{short_length(n)}</th>" for n in lengths)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _accuracy_cell(row: dict[str, Any] | None) -> str:
    if row is None or row["accuracy"] is None:
        return "<td>–</td>"
    tint = f"background:rgba(44,127,184,{0.3 * row['accuracy']:.3f})"
    counts = f"<small>{row['correct']:g}/{row['total']:g}</small>"
    return f'<td class="cell" style="{tint}">{row["accuracy"]:.0%}{counts}</td>'


def _samples(found: dict[str, Any]) -> str:
    samples = (found["eval"] or {}).get("samples") or []
    if not samples:
        return section("Samples", missing("generated text", "eval.json holds no samples"))
    # The same prompt's continuations stand together.
    prompts = list(dict.fromkeys(str(s.get("prompt", "")) for s in samples))
    blocks, colours = [], _colours(found)
    between, about = "", "Greedy continuations; the prompt in grey."
    if ((found["config"] or {}).get("evaluate") or {}).get("chat"):
        between, about = "<br>", "Greedy answers; the user's turn in grey."
    for sample in sorted(samples, key=lambda s: prompts.index(str(s.get("prompt", "")))):
        model, prompt = str(sample.get("model", "model")), str(sample.get("prompt", ""))
        shown = f'<span class="prompt">{escape(prompt if len(prompt) <= 700 else f"… {prompt[-700:]}")}</span>'
        blocks.append(
            f'<div class="sample" style="--c:{colours[model]}"><div class="who">{escape(model_name(model))}</div>'
            f"<p>{shown}{between}{escape(str(sample.get('text', '')))}</p></div>"
        )
    return section("Samples", f'<p class="about">{about}</p>', *blocks)


def _colours(found: dict[str, Any]) -> dict[str, str]:
    """The models' colours, the same as in the plots; written samples are usually of measured models."""
    evaluated = found["eval"] or {}
    wrote = (str(sample.get("model", "model")) for sample in evaluated.get("samples") or ())
    return model_colours([*(evaluated.get("models") or {}), *wrote])


def _dot(model: str, colours: Mapping[str, str]) -> str:
    return f'<span class="dot" style="--c:{colours[model]}"></span>{escape(model_name(model))}'


def _mean_accuracy(rows: Sequence[dict[str, Any]], model: str, length: int) -> float | None:
    """The mean over tasks, as RULER averages."""
    values = [r["accuracy"] for r in rows if r["model"] == model and r["length"] == length]
    return math.fsum(values) / len(values) if values else None


def _tokens_trained(found: dict[str, Any]) -> float:
    return sum(records[-1].get("tokens") or 0 for records in found["stages"].values())


def _made(found: dict[str, Any]) -> str:
    config = found["config"] or {}
    return provenance(found["run"], config, [config["seed"]] if "seed" in config else [])
