"""The report of a work directory: everything measured, as one page (report/index.html) and one file (report.json)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import tempfile
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.intervals import wilson

# Names of stages and models in the order they are shown; others follow in the order of the files.
STAGES = ("align", "distill", "finetune", "train")
MODELS = ("teacher", "student", "student_unscaled")
TASK_ORDER = ("S1", "S2", "S2-like", "S3", "S3-like")
# What the scores of a way to choose the attention layers are.
SELECTION_METHODS = {
    "halo": "recall lost over common sense lost, one layer replaced at a time (HALO)",
    "jet-nemotron": "recall lost, one layer replaced at a time",
    "kl-ls": "KL to the teacher, one layer replaced at a time",
    "kl-ls-restored": "KL to the teacher, one layer's attention put back into the all-Lightning model; nothing trained",
    "gate-search": "both mixers in every layer, a learned gate between them, all layers at once",
    "evenly": "every n-th layer; nothing measured",
    "latter-half": "evenly in the latter half; nothing measured",
    "none": "no attention at all",
}

# The needles that `evaluate` asks for every a of a grid.
SCALE_NEEDLES = "scale_needles.json"

_MARK = '<meta name="generator" content="hypenet_jax report">'


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
    """Write W/report/index.html and W/report/report.json from what the work directory holds; the page's path.

    The work directory of a comparison gets a page of its own kind, and the figure as figure.png too.
    The page is self-contained: inline styles and SVG, nothing loaded from anywhere. What is missing is shown as not
    measured. Raises HypenetError when the directory holds nothing to report, when one of its files is broken, or when
    report/index.html is a page of somebody else.
    """
    directory = pathlib.Path(workdir)
    found, page, files = _drawn(directory)
    target = directory / "report"
    index = target / "index.html"
    check_ours(index, _MARK)
    text = page(found, _MARK)
    try:
        target.mkdir(exist_ok=True)
        for name, content in files.items():
            replace_file(target / name, content)
        replace_file(target / "report.json", (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
        replace_file(index, text.encode())
    except OSError as error:
        raise HypenetError(f"{target} cannot be written ({error}); free space or check its permissions") from error
    return index


def _drawn(directory: pathlib.Path) -> tuple[dict[str, Any], Callable[[dict[str, Any], str], str], dict[str, bytes]]:
    """(what report.json holds, the function that makes the page of it, further files)."""
    # matplotlib is imported only where a page is drawn.
    if "variants" in (read_object(directory / "config.json") or {}):
        from hypenet_jax.evals import comparison, comparison_html

        found = comparison.gather(directory)
        return found, comparison_html.page, {"figure.png": comparison_html.picture(found)}
    from hypenet_jax.evals import report_html

    return gather(directory), report_html.page, {}


def gather(workdir: str | os.PathLike) -> dict[str, Any]:
    """Everything the page shows, JSON-able; keys of missing pieces hold None or are empty.

    {"name", "kind" ("conversion" or "training"), "config", "teacher", "student", "stages", "select", "fit_scale",
    "scale_needles", "eval", "accuracy", "run"}: teacher and student in the words of `summary`, stages {name:
    [records]}, accuracy rows {"model", "task", "length", "correct", "total", "accuracy", "low", "high"} (Wilson's 95%
    interval). Non-finite numbers become None.
    """
    directory = pathlib.Path(workdir)
    if not directory.is_dir():
        raise HypenetError(f"the work directory {directory} does not exist; give one that `hypenet convert` made")
    config, run = read_object(directory / "config.json"), read_object(directory / "run.json")
    select, fit = read_object(directory / "select.json"), read_object(directory / "fit_scale.json")
    evaluated, export = read_object(directory / "eval.json"), read_object(directory / "export" / "config.json")
    stages = {name: records for name in STAGES if (records := metrics_records(directory / name / "metrics.jsonl"))}
    if all(piece is None for piece in (config, select, fit, evaluated, export)) and not stages:
        raise HypenetError(f"the work directory {directory} holds nothing to report; run `hypenet convert` first")
    _check_eval(directory / "eval.json", evaluated)
    scratch = "model" in config if config else "train" in stages
    student = summary(export) if export else _student_of(select, config)
    return finite(
        {
            "name": directory.resolve().name,
            "kind": "training" if scratch else "conversion",
            "config": config,
            "teacher": _teacher_of(config, student),
            "student": student,
            "stages": stages,
            "select": select,
            "fit_scale": fit,
            "scale_needles": read_object(directory / SCALE_NEEDLES),
            "eval": evaluated,
            "accuracy": accuracy_rows(evaluated),
            "run": run,
        }
    )


def summary(config: dict[str, Any]) -> dict[str, Any]:
    """The facts of a model config that the page shows, from a Hugging Face config.json or a ModelConfig's dict."""
    names = {
        "layers": ("num_hidden_layers", "num_layers"),
        "width": ("hidden_size",),
        "ffn": ("intermediate_size",),
        "heads": ("num_attention_heads", "num_heads"),
        "kv_heads": ("num_key_value_heads", "num_kv_heads"),
        "head_dim": ("head_dim",),
        "vocabulary": ("vocab_size",),
        "tied_head": ("tie_word_embeddings", "tie_embeddings"),
        "rope_theta": ("rope_theta",),
        "attention_rope": ("attn_use_rope", "attention_rope"),
        "attention_gate": ("attn_use_output_gate", "attention_gate"),
        "scaling": ("attn_logits_scaling", "logits_scaling"),
        "max_position": ("max_position_embeddings", "max_position"),
    }
    facts = {}
    for fact, keys in names.items():
        facts[fact] = next((config[key] for key in keys if config.get(key) is not None), None)
    if config.get("model_type") in ("qwen3", "llama"):
        facts |= {"attention_rope": True, "attention_gate": False}
    given = config.get("mixer_types") or config.get("mixers")
    if given is None and isinstance(facts["layers"], int):
        given = ["attention"] * facts["layers"]
    facts["mixers"] = ["attention" if str(m).startswith("att") else str(m).split("-")[0] for m in given or []]
    return facts


def accuracy_rows(evaluated: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Needle accuracy by (model, task, length) over all depths, with Wilson's 95% interval."""
    counts: dict[tuple[str, str, int], list[float]] = defaultdict(lambda: [0, 0])
    for model, measured in ((evaluated or {}).get("models") or {}).items():
        for row in measured.get("niah") or ():
            cell = counts[model, row["task"], row["length"]]
            cell[0] += row["correct"]
            cell[1] += row["total"]
    rows = []
    for (model, task, length), (correct, total) in counts.items():
        low, high = wilson(correct, int(total))
        share = correct / total if total else None
        rows.append(
            {"model": model, "task": task, "length": length, "correct": correct, "total": total}
            | {"accuracy": share, "low": low, "high": high}
        )
    return sorted(rows, key=lambda r: (ordered(r["task"], TASK_ORDER), ordered(r["model"], MODELS), r["length"]))


def ordered(name: str, order: tuple[str, ...]) -> tuple[int, str]:
    """Sort key: names of `order` first and in its order, others after them by name."""
    return (order.index(name), "") if name in order else (len(order), name)


def _teacher_of(config: dict[str, Any] | None, student: dict[str, Any] | None) -> dict[str, Any] | None:
    """The teacher's own config where it can be read, else what conversion leaves as it was in the student."""
    if not config or "teacher" not in config:
        return None
    teacher = {"name": str(config["teacher"])}
    own = _own_config(pathlib.Path(teacher["name"]).expanduser())
    if own is not None:
        return teacher | summary(own)
    if student is None:
        return teacher
    kept = ("layers", "width", "ffn", "heads", "kv_heads", "head_dim", "vocabulary", "tied_head", "rope_theta")
    shared = {fact: student.get(fact) for fact in kept}
    return teacher | shared | {"mixers": ["attention"] * len(student["mixers"])}


def _own_config(teacher: pathlib.Path) -> dict[str, Any] | None:
    """What a directory's config.json or a GGUF file's metadata say; None where nothing, or an unreadable file, is."""
    if not teacher.is_file():
        return read_object(teacher / "config.json")
    # Imported here: only a GGUF file needs the hub, whose import is slow.
    from hypenet_jax.hub import read_config
    from hypenet_jax.model.serialize import config_to_dict

    # The page is about the work directory: a teacher that has become unreadable does not keep it from being written.
    with contextlib.suppress(HypenetError, OSError):
        return config_to_dict(read_config(teacher))
    return None


def _student_of(select: dict[str, Any] | None, config: dict[str, Any] | None) -> dict[str, Any] | None:
    """What is known of the student before its export: its layers, or the sizes it was asked to have."""
    sizes = (config or {}).get("model")
    if sizes:
        attention = sizes.get("attention_layers")
        layers = range(sizes["num_layers"])
        chosen = layers if attention is None else attention
        return summary(sizes | {"mixers": ["attention" if i in chosen else "lightning" for i in layers]})
    if not select:
        return None
    scores = next((select[name] for name in ("scores", "recall", "csr", "kl") if select.get(name)), None)
    if scores is None:
        return None
    mixers = ["attention" if i in select["layers"] else "lightning" for i in range(len(scores))]
    return {"layers": len(scores), "mixers": mixers}


def read_object(path: pathlib.Path) -> dict[str, Any] | None:
    """The file's JSON object, None where there is no file; HypenetError for anything else."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HypenetError(f"{path} is not valid JSON ({error}); remove it and run its step again") from error
    if not isinstance(value, dict):
        raise HypenetError(f"{path} holds a {type(value).__name__}; it must be a JSON object, so run its step again")
    return value


def metrics_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """Records by step, the later of two winning; a torn last line (a run cut off while writing) is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records[record["step"]] = record
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number < len(lines):
                raise HypenetError(f"{path} line {number} is not a metrics line; remove or mend it") from error
    return [records[step] for step in sorted(records)]


def _check_eval(path: pathlib.Path, evaluated: dict[str, Any] | None) -> None:
    for model, measured in ((evaluated or {}).get("models") or {}).items():
        for section, keys in (
            ("niah", {"task", "length", "depth", "correct", "total"}),
            ("perplexity_by_position", {"start", "stop", "nll"}),
        ):
            for row in measured.get(section) or ():
                if not isinstance(row, dict) or not keys <= row.keys():
                    wanted = ", ".join(sorted(keys))
                    raise HypenetError(f"{path} has {section} rows of {model} without {wanted}; evaluate again")


def finite(value: Any) -> Any:
    """The value with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_ours(page: pathlib.Path, mark: str) -> None:
    """Raise HypenetError where a page is already there that does not begin with our mark: it is somebody else's."""
    if page.exists() and mark not in page.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise HypenetError(f"{page} is not a page of hypenet_jax; move it away")


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Write a file beside its place and move it there."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise
