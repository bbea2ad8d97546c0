"""What a model card says of a run's text and of its stages: what was read, and what was really minimised."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from hypenet_jax.data.pack_meta import META, read_meta
from hypenet_jax.evals.card_tables import count, number, section, table
from hypenet_jax.evals.report import STAGES, ordered, read_object

_CHECKPOINT = "hypenet_checkpoint.json"
_CROSS_ENTROPY = "next-token cross-entropy"


def data(found: dict[str, Any], workdir: pathlib.Path) -> str:
    """The sources, the sizes of the packs, and how much of each the stages read."""
    config = found["config"] or {}
    settings, own = config.get("data"), config.get("finetune_sources") or ()
    if not settings:
        return ""
    lines = ["- sources: " + _quoted(settings["sources"])]
    if own:
        lines.append("- sources of stage finetune: " + _quoted(own))
    if settings.get("heldout"):
        lines.append("- held out: " + _quoted(settings["heldout"]))
    else:
        lines.append(
            f"- held out: a share of {settings['heldout_share']:g} of the documents, chosen by their beginnings"
        )
    tokens = {name: records[-1].get("tokens") or 0 for name, records in found["stages"].items()}
    alone = {name: read for name, read in tokens.items() if own and name == "finetune"}
    shared = {name: read for name, read in tokens.items() if name not in alone}
    packs: tuple[tuple[str, str, Sequence[str], dict[str, int]], ...] = (
        ("train", "to train on", settings["sources"], shared),
        ("finetune", "of stage finetune", own, alone),
        ("heldout", "held out", settings["heldout"], {}),
    )
    for name, words, sources, read in packs:
        places = (workdir / "data" / name, *map(pathlib.Path, sources))
        packed = next((place for place in places if (place / META).is_file()), None)
        if packed is None:
            continue
        info = read_meta(packed)
        lines.append(f"- {words}: {info.tokens:,} tokens of {info.documents:,} documents")
        if read:
            lines.append(_read(read, info.tokens))
    return section("Data", "\n".join(lines))


def _quoted(sources: Sequence[str]) -> str:
    return ", ".join(f"`{source}`" for source in sources)


def stages(found: dict[str, Any], workdir: pathlib.Path) -> str:
    """The table of the stages that have run, with what each minimised."""
    rows = []
    for name in sorted(found["stages"], key=lambda name: ordered(name, STAGES)):
        records, settings = found["stages"][name], (found["config"] or {}).get(name) or {}
        first, last = records[0], records[-1]
        wanted = settings.get("steps", last["step"])
        rows.append(
            [
                f"{name} ({objective(name, found['config'] or {}, _begun(workdir / name))})",
                f"{last['step']:,}" + (f" of {wanted:,}" if wanted != last["step"] else ""),
                f"{settings['batch_size']} x {settings['seq_len']:,}" if settings else "",
                count(last.get("tokens")),
                _learning_rate(settings),
                f"{number(first.get('loss'), '.4f')} to {number(last.get('loss'), '.4f')}",
                number(last.get("seconds"), ",.0f"),
            ]
        )
    head = ["stage", "steps", "rows x tokens", "tokens", "learning rate", "loss, first to last step logged", "seconds"]
    return section("Training", table(head, rows)) if rows else ""


def objective(name: str, config: dict[str, Any], begun: dict[str, Any]) -> str:
    """What a stage minimises, in words.

    config: of the run, as config.json holds it. begun: the JSON of the stage's latest checkpoint, {} where there is
    none; the teacher's output may be live in one call of a run and kept in another, so that only it can tell.
    """
    words = {"align": "hidden-state alignment: MSE between the mixers' outputs"}
    if name == "distill":
        words[name] = "distillation: " + _distillation(config, begun)
    elif name == "finetune":
        only = ", in conversations on what the assistant says alone"
        words[name] = "long-context finetune: " + _CROSS_ENTROPY
        words[name] += only if config.get("finetune_loss") == "completions" else ""
    elif name == "train":
        start = "from random parameters" if config.get("start_from") is None else f"from `{config['start_from']}`"
        words[name] = f"{start}: {_CROSS_ENTROPY}"
    notes = [words.get(name, name)]
    if (config.get("data") or {}).get("documents") == "joined":
        notes.append("documents of a row joined, not masked from each other")
    if (config.get(name) or {}).get("weights") == "bfloat16":
        notes.append("weights and moments in bfloat16")
    return "; ".join(notes)


def _distillation(config: dict[str, Any], begun: dict[str, Any]) -> str:
    kept = _kept_output(config, begun)
    if kept is not None:
        return kept
    weights = {"ce_weight": 0.0, "hidden_weight": 0.0, "kl_one_in": 1} | (config.get("objective") or {})
    ce, hidden, one_in = weights["ce_weight"], weights["hidden_weight"], weights["kl_one_in"]
    kl = "KL(teacher, student) over the whole vocabulary"
    if one_in != 1:
        kl += f" of one row in {one_in}, divided by the tokens of all"
    parts = {
        kl: 1 - ce,
        _CROSS_ENTROPY: ce,
        "squared error of the last hidden states, relative to the teacher's": hidden,
    }
    terms = [what if weight == 1 else f"{weight:g} x {what}" for what, weight in parts.items() if weight]
    return " + ".join(terms)


def _kept_output(config: dict[str, Any], begun: dict[str, Any]) -> str | None:
    """The KL from a teacher's kept output, where that was read; None for a live teacher."""
    form = ((begun.get("data") or {}).get("stream") or {}).get("teacher")
    if form is not None:
        likeliest = str(form).rpartition(" ")[2]
        return f"KL(teacher, student) over the teacher's {likeliest} likeliest tokens and all others together"
    if ((begun.get("config") or config).get("teacher_output") or "live") == "live":
        return None
    kind = "last hidden states" if begun else "output"
    return f"KL(teacher, student) over the whole vocabulary, from the teacher's kept {kind}"


def _begun(stage: pathlib.Path) -> dict[str, Any]:
    """The JSON of the stage's latest checkpoint, {} where there is none."""
    files = [file for file in stage.glob(f"checkpoints/*/data/{_CHECKPOINT}") if file.parents[1].name.isdecimal()]
    latest = max(files, key=lambda file: int(file.parents[1].name), default=None)
    return {} if latest is None else read_object(latest) or {}


def _read(tokens: dict[str, int], packed: int) -> str:
    """How many tokens the stages have read of a pack, which is neither the pack nor bounded by it."""
    parts = ", ".join(f"{name} {tokens[name]:,}" for name in sorted(tokens, key=lambda name: ordered(name, STAGES)))
    total = sum(tokens.values())
    return f"- trained on: {total:,} tokens ({parts}), {total / packed:.3g} times the text to train on"


def _learning_rate(settings: dict[str, Any]) -> str:
    if not settings:
        return ""
    end = f" to {settings['end_lr']:g}" if settings["schedule"] == "cosine" else ""
    return f"{settings['peak_lr']:g}{end}, {settings['schedule']}, warm-up {settings['warmup_steps']}"
