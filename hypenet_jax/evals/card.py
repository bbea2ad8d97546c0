"""The model card of a run: everything that its work directory holds about the student, and nothing else."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from hypenet_jax import __version__
from hypenet_jax.data.pack_meta import META, read_meta
from hypenet_jax.evals.report import MODELS, STAGES, gather, ordered
from hypenet_jax.hub.card import card, described, source_of, tags_of, usage
from hypenet_jax.model import ModelConfig

_GOALS = {
    "align": "hidden-state alignment: MSE between the mixers' outputs",
    "distill": "distillation: KL(teacher, student) over the whole vocabulary",
    "finetune": "long-context finetune: next-token cross-entropy",
    "train": "from scratch: next-token cross-entropy",
}
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
    teacher = (found["config"] or {}).get("teacher")
    source = None if teacher is None else source_of(teacher)
    title = f"A {config.family} model trained from scratch" if source is None else f"HypeNet out of {source.name}"
    sections = [
        _origin(None if source is None else source.repository or source.name),
        described(config, dtype),
        _data(found, pathlib.Path(workdir)),
        _stages(found),
        _selection(found),
        _scaling(found),
        _needles(found),
        _perplexity(found),
        usage(),
        _provenance(found, command),
    ]
    return card(title, sections, source, tags_of(config))


def _origin(teacher: str | None) -> str:
    if teacher is None:
        return "A language model trained from random parameters by hypenet_jax."
    return (
        f"A hybrid of softmax attention and Lightning (linear) attention, made of the teacher `{teacher}` by HALO "
        "(arXiv 2601.22156) with hypenet_jax: weight transfer, alignment, layer selection, distillation, long-context "
        "finetune, and a fit of the attention scaling."
    )


def _data(found: dict[str, Any], workdir: pathlib.Path) -> str:
    data = (found["config"] or {}).get("data")
    if not data:
        return ""
    lines = ["## Data", "", "- sources: " + ", ".join(f"`{source}`" for source in data["sources"])]
    if data.get("heldout"):
        lines.append("- held out: " + ", ".join(f"`{source}`" for source in data["heldout"]))
    else:
        lines.append(f"- held out: a share of {data['heldout_share']:g} of the documents, chosen by their beginnings")
    for name, words in (("train", "trained on"), ("heldout", "held out")):
        packed = next((one for one in (workdir / "data" / name, *_packs(data, name)) if (one / META).is_file()), None)
        if packed is not None:
            info = read_meta(packed)
            lines.append(f"- {words}: {info.tokens:,} tokens of {info.documents:,} documents")
    return "\n".join(lines)


def _packs(data: dict[str, Any], name: str) -> list[pathlib.Path]:
    """Sources that may be packed tokens already."""
    return [pathlib.Path(source) for source in data["sources" if name == "train" else "heldout"]]


def _stages(found: dict[str, Any]) -> str:
    rows = []
    for name in sorted(found["stages"], key=lambda name: ordered(name, STAGES)):
        records, settings = found["stages"][name], (found["config"] or {}).get(name) or {}
        first, last = records[0], records[-1]
        wanted = settings.get("steps", last["step"])
        rows.append(
            [
                f"{name} ({_GOALS.get(name, name)})",
                f"{last['step']:,}" + (f" of {wanted:,}" if wanted != last["step"] else ""),
                f"{settings['batch_size']} x {settings['seq_len']:,}" if settings else "",
                _count(last.get("tokens")),
                _learning_rate(settings),
                f"{_number(first.get('loss'), '.4f')} to {_number(last.get('loss'), '.4f')}",
                _number(last.get("seconds"), ",.0f"),
            ]
        )
    head = ["stage", "steps", "rows x tokens", "tokens", "learning rate", "loss, first to last step logged", "seconds"]
    return _section("Training", _table(head, rows)) if rows else ""


def _learning_rate(settings: dict[str, Any]) -> str:
    if not settings:
        return ""
    end = f" to {settings['end_lr']:g}" if settings["schedule"] == "cosine" else ""
    return f"{settings['peak_lr']:g}{end}, {settings['schedule']}, warm-up {settings['warmup_steps']}"


def _selection(found: dict[str, Any]) -> str:
    chosen = found["select"]
    if not chosen:
        return ""
    student = (found["config"] or {}).get("student") or {}
    layers = ", ".join(map(str, chosen["layers"])) or "none"
    lines = [f"- attention kept in layers {layers} (counted from 0), method `{chosen['method']}`"]
    lines += [f"- {name}: `{student[name]}`" for name in ("position", "start") if student.get(name)]
    return _section("Layers", "\n".join(lines))


def _scaling(found: dict[str, Any]) -> str:
    fitted = found["fit_scale"]
    if not fitted:
        return ""
    return _section(
        "Attention scaling",
        f"a = {fitted['a']:g}, fitted on {fitted['documents']} held-out documents of {fitted['length']:,} tokens: loss "
        f"{_number(min(fitted['loss']), '.4f')} at the best of the grid, {_number(fitted['loss_unscaled'], '.4f')} "
        "without scaling.",
    )


def _needles(found: dict[str, Any]) -> str:
    rows, evaluated = found["accuracy"], found["eval"] or {}
    if not rows:
        return ""
    models = _own({row["model"] for row in rows})
    cells = {(row["task"], row["length"], row["model"]): _accuracy(row) for row in rows}
    keys = list(dict.fromkeys((row["task"], row["length"]) for row in rows))
    table = [[task, f"{n:,}", *(cells.get((task, n, model), "") for model in models)] for task, n in _by_task(keys)]
    notes = ["RULER's NIAH, found of asked, with Wilson's 95% interval."]
    if any(task.endswith("-like") for task, _ in keys):
        notes.append('Tasks called "-like" hide their needles in other prose than RULER\'s and do not compare with it.')
    answer = (evaluated.get("settings") or {}).get("answer")
    if answer == "forced":
        notes.append("Found: greedy decoding would begin with the answer.")
    if evaluated.get("train_length"):
        notes.append(f"The last stage trained on rows of {evaluated['train_length']:,} tokens.")
    head = ["task", "length", *(_MODELS.get(model, model) for model in models)]
    return _section("Needles in a haystack", " ".join(notes) + "\n\n" + _table(head, table))


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
    rows = [["perplexity, all positions", *(_number(measured[model]["perplexity"], ".3f") for model in models)]]
    for (start, stop), losses in sorted(buckets.items()):
        rows.append([f"loss, positions {start:,} to {stop:,}", *(_number(losses.get(m), ".4f") for m in models)])
    head = ["", *(_MODELS.get(model, model) for model in models)]
    return _section("Perplexity", f"{about}; losses in nats a token.\n\n{_table(head, rows)}")


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
    return _section("Reproduce", text)


def _section(heading: str, text: str) -> str:
    return f"## {heading}\n\n{text}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _count(tokens: int | None) -> str:
    return "" if tokens is None else f"{tokens:,}"
