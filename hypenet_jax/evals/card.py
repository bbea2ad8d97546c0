"""The model card of a run: everything that its work directory holds about the student, and nothing else."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from hypenet_jax import __version__
from hypenet_jax.evals import card_training
from hypenet_jax.evals.card_tables import number, section, table
from hypenet_jax.evals.report import MODELS, gather, ordered
from hypenet_jax.hub.card import Source, card, described, source_of, tags_of, usage
from hypenet_jax.model import ModelConfig

_MODELS = {"student_unscaled": "student without scaling"}


def run_card(workdir: str | os.PathLike[str], config: ModelConfig, dtype: str, command: str | None = None) -> str:
    """The text of README.md for the model of a work directory.

    Args:
      workdir: a run's; of what it does not hold (yet), the card says nothing.
      config: of the exported model; dtype: what its weights are stored in.
      command: what reproduces the run.

    Raises:
      HypenetError: a file of the directory is broken.
    """
    found = gather(workdir)
    settings = found["config"] or {}
    made_of = settings.get("teacher") or settings.get("start_from")
    source = None if made_of is None else source_of(made_of)
    trained = "trained from scratch" if source is None else f"trained on from {source.name}"
    title = (
        f"HypeNet out of {source.name}" if source and "teacher" in settings else f"A {config.family} model {trained}"
    )
    sections = [
        _origin(settings, source),
        described(config, dtype),
        card_training.data(found, pathlib.Path(workdir)),
        card_training.stages(found, pathlib.Path(workdir)),
        _selection(found),
        _scaling(found),
        _needles(found),
        _perplexity(found),
        usage(),
        _provenance(found, command),
    ]
    return card(title, sections, source, tags_of(config))


def _origin(settings: dict[str, Any], source: Source | None) -> str:
    if source is None:
        return "A language model trained from random parameters by hypenet_jax."
    name = source.repository or source.name
    if "teacher" not in settings:
        text = f"A language model trained on from `{name}` (`{settings['start_from']}`) by hypenet_jax"
        share = settings.get("start_share", 1.0)
        return text + ("." if share == 1 else f": its matrices times {share:g} plus {1 - share:g} of random ones.")
    return (
        f"A hybrid of softmax attention and Lightning (linear) attention, made of the teacher `{name}` by HALO "
        "(arXiv 2601.22156) with hypenet_jax: weight transfer, alignment, layer selection, distillation, long-context "
        "finetune, and a fit of the attention scaling."
    )


def _selection(found: dict[str, Any]) -> str:
    chosen = found["select"]
    if not chosen:
        return ""
    student = (found["config"] or {}).get("student") or {}
    layers = ", ".join(map(str, chosen["layers"])) or "none"
    method = f"method `{chosen['method']}`"
    scores = ((found["config"] or {}).get("select") or {}).get("scores")
    if scores is not None and chosen["method"] != "given":
        method += f" over the scores of `{scores}`"
    lines = [f"- attention kept in layers {layers} (counted from 0), {method}"]
    lines += [f"- {name}: `{student[name]}`" for name in ("position", "start") if student.get(name)]
    return section("Layers", "\n".join(lines))


def _scaling(found: dict[str, Any]) -> str:
    fitted = found["fit_scale"]
    if not fitted:
        return ""
    a, lost = f"a = {fitted['a']:g}", fitted.get("tolerance")
    if lost:
        a += f" (the smallest that loses at most {lost:g} nats against the best, {fitted['best']:g})"
    return section(
        "Attention scaling",
        f"{a}, fitted on {fitted['documents']} held-out documents of {fitted['length']:,} tokens: loss "
        f"{number(min(fitted['loss']), '.4f')} at the best of the grid, {number(fitted['loss_unscaled'], '.4f')} "
        "without scaling.",
    )


def _needles(found: dict[str, Any]) -> str:
    rows, evaluated = found["accuracy"], found["eval"] or {}
    if not rows:
        return ""
    models = _own({row["model"] for row in rows})
    cells = {(row["task"], row["length"], row["model"]): _accuracy(row) for row in rows}
    keys = list(dict.fromkeys((row["task"], row["length"]) for row in rows))
    lines = [[task, f"{n:,}", *(cells.get((task, n, model), "") for model in models)] for task, n in _by_task(keys)]
    notes = ["RULER's NIAH, found of asked, with Wilson's 95% interval."]
    if any(task.endswith("-like") for task, _ in keys):
        notes.append('Tasks called "-like" hide their needles in other prose than RULER\'s and do not compare with it.')
    answer = (evaluated.get("settings") or {}).get("answer")
    if answer == "forced":
        notes.append("Found: greedy decoding would begin with the answer.")
    if evaluated.get("train_length"):
        notes.append(f"The last stage trained on rows of {evaluated['train_length']:,} tokens.")
    head = ["task", "length", *(_MODELS.get(model, model) for model in models)]
    return section("Needles in a haystack", " ".join(notes) + "\n\n" + table(head, lines))


def _own(names: Iterable[str]) -> list[str]:
    """The models that the run made or began with, in order; others were measured beside them for the report."""
    return sorted({*names} & {*MODELS, "model"}, key=lambda name: ordered(name, MODELS))


def _by_task(keys: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """(task, length) pairs: tasks as they come, lengths ascending."""
    order = list(dict.fromkeys(task for task, _ in keys))
    return sorted(keys, key=lambda key: (order.index(key[0]), key[1]))


def _accuracy(row: dict[str, Any]) -> str:
    if not row["total"]:
        return ""
    low, high = (100 * row[name] for name in ("low", "high"))
    return f"{row['correct']} of {row['total']}, {100 * row['accuracy']:.0f}% ({low:.0f} to {high:.0f})"


def _perplexity(found: dict[str, Any]) -> str:
    measured = (found["eval"] or {}).get("models") or {}
    models = _own(name for name in measured if measured[name].get("perplexity"))
    if not models:
        return ""
    settings = found["eval"].get("settings") or {}
    about = "Held-out documents"
    if settings.get("perplexity_length"):
        about += f" of {settings['perplexity_length']:,} tokens, at most {settings['perplexity_documents']}"
    buckets: dict[tuple[int, int], dict[str, float]] = {}
    for model in models:
        for row in measured[model].get("perplexity_by_position") or ():
            buckets.setdefault((row["start"], row["stop"]), {})[model] = row["nll"]
    rows = [["perplexity, all positions", *(number(measured[model]["perplexity"], ".3f") for model in models)]]
    for (start, stop), losses in sorted(buckets.items()):
        rows.append([f"loss, positions {start:,} to {stop:,}", *(number(losses.get(m), ".4f") for m in models)])
    head = ["", *(_MODELS.get(model, model) for model in models)]
    return section("Perplexity", f"{about}; losses in nats a token.\n\n{table(head, rows)}")


def _provenance(found: dict[str, Any], command: str | None) -> str:
    run = found["run"] or {}
    versions = {"hypenet_jax": __version__, **(run.get("versions") or {})}
    parts = ["Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."]
    if run.get("device"):
        parts.append(f"Devices of the last step: {run['device']}.")
    if (found["config"] or {}).get("seed") is not None:
        parts.append(f"Seed: {found['config']['seed']}.")
    text = " ".join(parts)
    if command:
        text = f"```bash\n{command}\n```\n\n{text}"
    return section("Reproduce", text)
