"""The last step: teacher and student by the same measurements, and the scores into the export's card."""

from __future__ import annotations

import dataclasses
import json

from hypenet_jax.evals import suite
from hypenet_jax.evals.card import run_card
from hypenet_jax.evals.report import SCALE_NEEDLES
from hypenet_jax.halo import corpus
from hypenet_jax.halo.run import Run, finished_student
from hypenet_jax.halo.scale_needles import scale_needles
from hypenet_jax.halo.workdir import read_json, timed, write_json
from hypenet_jax.hub.card import CARD, replace_card
from hypenet_jax.model import LanguageModel
from hypenet_jax.parallel.processes import first
from hypenet_jax.train.preemption import EXIT_PREEMPTED, Preemption

EXPORT, EXPORT_DTYPE = "export", "float32"


def evaluate(run: Run) -> dict:
    """Teacher, student, and student without scaling, by the same measurements. Written to eval.json model by model."""
    path, settings = run.workdir / "eval.json", run.config.evaluate
    student, student_params = finished_student(run)
    models = {
        "teacher": (run.teacher, run.teacher_params),
        "student": (student, student_params),
        "student_unscaled": (student.with_logits_scaling(None), student_params),
    }
    # What is asked for every a has a file of its own.
    asked = {k: v for k, v in dataclasses.asdict(settings).items() if not k.startswith("scale_")}
    wanted = {"settings": asked, "train_length": run.config.finetune.seq_len}
    found = read_json(path) if path.is_file() else {}
    if {name: found.get(name) for name in wanted} != json.loads(json.dumps(wanted)):
        found = wanted | {"teacher_length": run.config.distill.seq_len, "models": {}, "samples": []}
    windows, essays = corpus.measured_text(settings, run.heldout, run.tokenizer)
    begun = found.pop("begun", {})
    for name, (model, params) in models.items():
        if name in found["models"]:
            continue

        def say(line: str, name: str = name) -> None:
            run.reporter.message(f"evaluate {name}  {line}")

        with timed(run.workdir, f"evaluate {name}"), Preemption() as preemption:

            def keep(measured: dict, name: str = name, preemption: Preemption = preemption) -> None:
                write_json(path, found | {"begun": {name: measured}})
                if preemption.requested():
                    run.reporter.message(f"evaluate {name}: stopped and saved; the same command continues")
                    raise SystemExit(EXIT_PREEMPTED)

            found["models"][name] = suite.evaluate_model(
                model,
                params,
                run.tokenizer,
                settings,
                windows=windows,
                essays=essays,
                seed=run.config.seed,
                report=say,
                begun=begun.get(name),
                keep=keep,
            )
            if name != "student_unscaled":
                found["samples"] += suite.write_samples(
                    name, model, params, run.tokenizer, settings.prompts, settings.new_tokens, chat=settings.chat
                )
        write_json(path, found)
    if settings.scale_lengths:
        _needles_by_scale(run, essays)
    first(lambda: _renew_card(run, student))
    return found


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
