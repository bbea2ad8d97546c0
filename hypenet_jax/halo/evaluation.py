"""The last step: teacher and student by the same measurements, and the scores into the export's card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from hypenet_jax import hub
from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.card import run_card
from hypenet_jax.evals.report import SCALE_NEEDLES
from hypenet_jax.evals.report_style import MODEL_NAMES
from hypenet_jax.halo import corpus
from hypenet_jax.halo.measured import Evaluation, Measured, Questions
from hypenet_jax.halo.run import Run, finished_student, spread
from hypenet_jax.halo.scale_needles import scale_needles
from hypenet_jax.halo.teacher_cache import fingerprint
from hypenet_jax.halo.workdir import timed
from hypenet_jax.hub.card import CARD, replace_card
from hypenet_jax.model import LanguageModel
from hypenet_jax.parallel.processes import first
from hypenet_jax.train.preemption import stop_if_asked

EXPORT, EXPORT_DTYPE = "export", "float32"


def evaluate(run: Run, others: Mapping[str, str] = MappingProxyType({})) -> dict:
    """Teacher, student, student without scaling, and others, by the same measurements: eval.json, model by model.

    others: directories or files that `hub.load` reads, by name, with the teacher's tokenizer. They are read one at a
    time; one whose weights have changed since is measured again.
    """
    for name, source in others.items():
        _check_other(run, name, source)
    settings = run.config.evaluate
    student, student_params = finished_student(run)
    models: dict[str, Callable[[], Measured]] = {
        "teacher": lambda: Measured(run.teacher, run.teacher_params),
        "student": lambda: Measured(student, student_params),
        "student_unscaled": lambda: Measured(student.with_logits_scaling(None), student_params),
        **{name: partial(_other, run, source) for name, source in others.items()},
    }
    windows, essays = corpus.measured_text(settings, run.heldout, run.tokenizer)
    asked = Questions(settings, settings.needle_seed(run.config.seed), run.tokenizer, windows, essays)
    lengths = {"train_length": run.config.finetune.seq_len, "teacher_length": run.config.distill.seq_len}
    evaluation = Evaluation(run.workdir, asked, run.reporter.message, **lengths)
    for name, opened in models.items():
        evaluation.measure(name, opened(), f"evaluate {name}", samples=name != "student_unscaled")
    if settings.scale_lengths:
        _needles_by_scale(run, essays)
    first(lambda: _renew_card(run, student))
    return evaluation.found


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


def _other(run: Run, source: str) -> Measured:
    """A model from elsewhere, with the run's compute dtype and over its mesh."""
    model, params = hub.load(source)
    model, params = spread(run.config, run.mesh, model, params, run.config.rules)
    return Measured(model, params, {"from": source, "weights": fingerprint(model, params)})


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
            seed=run.config.evaluate.needle_seed(run.config.seed),
            report=run.reporter.message,
            between=partial(stop_if_asked, run.reporter.message, "evaluate needles"),
        )


def card(run: Run, student: LanguageModel) -> str:
    """The model card of the student, with what has been measured so far."""
    return run_card(run.workdir, student.config, EXPORT_DTYPE, run.command)


def _renew_card(run: Run, student: LanguageModel) -> None:
    """The scores into the card of the export, where there is one; a card that somebody has edited stays."""
    directory = run.workdir / EXPORT
    if directory.is_dir() and not replace_card(directory, card(run, student)):
        run.reporter.message(f"evaluate  {directory / CARD} was edited and is left as it is")
