"""The last step: teacher and student by the same measurements, and the scores into the export's card."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from hypenet_jax import hub
from hypenet_jax.errors import HypenetError
from hypenet_jax.evals import suite
from hypenet_jax.evals.card import run_card
from hypenet_jax.evals.report import SCALE_NEEDLES
from hypenet_jax.evals.report_style import MODEL_NAMES
from hypenet_jax.halo import corpus
from hypenet_jax.halo.run import Run, finished_student, spread
from hypenet_jax.halo.scale_needles import scale_needles
from hypenet_jax.halo.teacher_cache import fingerprint
from hypenet_jax.halo.workdir import read_json, timed, write_json
from hypenet_jax.hub.card import CARD, replace_card
from hypenet_jax.model import LanguageModel
from hypenet_jax.parallel.processes import first
from hypenet_jax.train.preemption import EXIT_PREEMPTED, Preemption

EXPORT, EXPORT_DTYPE = "export", "float32"


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A model to measure; about: what eval.json holds of it beside the scores, and what tells it from another."""

    model: LanguageModel
    params: dict
    about: dict[str, str] = dataclasses.field(default_factory=dict)


def evaluate(run: Run, others: Mapping[str, str] = MappingProxyType({})) -> dict:
    """Teacher, student, student without scaling, and others, by the same measurements: eval.json, model by model.

    others: directories or files that `hub.load` reads, by name, with the teacher's tokenizer. They are read one at a
    time; one whose weights have changed since is measured again.
    """
    for name, source in others.items():
        _check_other(run, name, source)
    path, settings = run.workdir / "eval.json", run.config.evaluate
    student, student_params = finished_student(run)
    models: dict[str, Callable[[], _Measured]] = {
        "teacher": lambda: _Measured(run.teacher, run.teacher_params),
        "student": lambda: _Measured(student, student_params),
        "student_unscaled": lambda: _Measured(student.with_logits_scaling(None), student_params),
        **{name: partial(_other, run, source) for name, source in others.items()},
    }
    # What is asked for every a has a file of its own.
    asked = {k: v for k, v in dataclasses.asdict(settings).items() if not k.startswith("scale_")}
    wanted = {"settings": asked, "train_length": run.config.finetune.seq_len}
    found = read_json(path) if path.is_file() else {}
    if {name: found.get(name) for name in wanted} != json.loads(json.dumps(wanted)):
        found = wanted | {"teacher_length": run.config.distill.seq_len, "models": {}, "samples": []}
    windows, essays = corpus.measured_text(settings, run.heldout, run.tokenizer)
    begun = found.pop("begun", {})
    for name, opened in models.items():
        _measure(run, path, found, begun.get(name), name, opened(), windows, essays)
    if settings.scale_lengths:
        _needles_by_scale(run, essays)
    first(lambda: _renew_card(run, student))
    return found


def _is_of(one: _Measured, measured: dict | None) -> bool:
    return measured is not None and all(measured.get(key) == value for key, value in one.about.items())


def _check_other(run: Run, name: str, source: str) -> None:
    """Raise HypenetError, before anything is measured, where a model cannot be asked what the run's own are."""
    if name in MODEL_NAMES:
        raise HypenetError(f"the model {source} is called {name!r}, a name of the run's own; give it another")
    config, tokenizer = hub.check(source)
    if config.vocab_size != run.teacher.config.vocab_size:
        raise HypenetError(
            f"{source} has a vocabulary of {config.vocab_size:,} and the run's teacher one of "
            f"{run.teacher.config.vocab_size:,}; name a model with the teacher's tokenizer"
        )
    if tokenizer is not None and tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise HypenetError(f"{source} has another tokenizer than the run's teacher; name a model with the teacher's")


def _other(run: Run, source: str) -> _Measured:
    """A model from elsewhere, with the run's compute dtype and over its mesh."""
    model, params = hub.load(source)
    model, params = spread(run.config, run.mesh, model, params, run.config.rules)
    return _Measured(model, params, {"from": source, "weights": fingerprint(model, params)})


def _measure(
    run: Run, path: pathlib.Path, found: dict, begun: dict | None, name: str, one: _Measured, windows, essays
) -> None:
    """Put the scores of one model into `found` and the file, unless they are there; kept after every cell."""
    if _is_of(one, found["models"].get(name)):
        return
    settings, say = run.config.evaluate, run.reporter.message
    found["samples"] = [sample for sample in found["samples"] if sample["model"] != name]
    with timed(run.workdir, f"evaluate {name}"), Preemption() as preemption:

        def keep(measured: dict) -> None:
            write_json(path, found | {"begun": {name: one.about | measured}})
            if preemption.requested():
                say(f"evaluate {name}: stopped and saved; the same command continues")
                raise SystemExit(EXIT_PREEMPTED)

        found["models"][name] = one.about | suite.evaluate_model(
            one.model,
            one.params,
            run.tokenizer,
            settings,
            windows=windows,
            essays=essays,
            seed=run.config.seed,
            report=lambda line: say(f"evaluate {name}  {line}"),
            begun=begun if _is_of(one, begun) else None,
            keep=keep,
        )
        if name != "student_unscaled":
            found["samples"] += suite.write_samples(
                name, one.model, one.params, run.tokenizer, settings.prompts, settings.new_tokens, chat=settings.chat
            )
    write_json(path, found)


def _needles_by_scale(run: Run, essays) -> None:
    """Whether the fitted a serves retrieval too: the same needles for a grid of a, W/scale_needles.json."""
    student, params = finished_student(run)
    with timed(run.workdir, "evaluate needles by a"):
        scale_needles(
            run.workdir / SCALE_NEEDLES,
            student,
            params,
            run.tokenizer,
            run.config.evaluate,
            grid=run.config.evaluate.scale_grid or run.config.fit_scale.grid,
            essays=essays,
            seed=run.config.seed,
            report=run.reporter.message,
        )


def card(run: Run, student: LanguageModel) -> str:
    """The model card of the student, with what has been measured so far."""
    return run_card(run.workdir, student.config, EXPORT_DTYPE, run.command)


def _renew_card(run: Run, student: LanguageModel) -> None:
    """The scores into the card of the export, where there is one; a card that somebody has edited stays."""
    directory = run.workdir / EXPORT
    if directory.is_dir() and not replace_card(directory, card(run, student)):
        run.reporter.message(f"evaluate  {directory / CARD} was edited and is left as it is")
