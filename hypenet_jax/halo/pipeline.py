"""HALO from a teacher to an evaluated, exported student: the order of the steps, each of them resumable."""

from __future__ import annotations

import dataclasses
import pathlib
from functools import partial

from hypenet_jax import hub
from hypenet_jax.config import to_mapping
from hypenet_jax.data.teacher_rows import TeacherOutput, read_output
from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.report import write_report
from hypenet_jax.halo import corpus, select, teacher_cache, variants
from hypenet_jax.halo.align import alignment_loss, mixers_of
from hypenet_jax.halo.distill import cached_distillation_loss, distillation_loss
from hypenet_jax.halo.evaluation import EXPORT, EXPORT_DTYPE, card, evaluate
from hypenet_jax.halo.finetune import next_token_loss
from hypenet_jax.halo.fit_scale import fit_scale
from hypenet_jax.halo.gate_search import GateSearch
from hypenet_jax.halo.probes import probes
from hypenet_jax.halo.run import (
    Run,
    finished,
    finished_student,
    start_student,
    student_model,
    student_of,
    transferred,
)
from hypenet_jax.halo.workdir import add_seconds, read_json, timed, write_json
from hypenet_jax.hub.directory import remove_partial
from hypenet_jax.model import LanguageModel
from hypenet_jax.model.serialize import config_to_dict
from hypenet_jax.parallel.processes import first
from hypenet_jax.parallel.rules import param_shardings, rules_of
from hypenet_jax.train.loop import train
from hypenet_jax.train.preemption import stop_if_asked
from hypenet_jax.train.stage import StageConfig

# `teacher_output` of a config: the teacher runs beside the student.
LIVE = "live"


def run_all(run: Run) -> pathlib.Path:
    """Every step of HALO in order, the evaluation and the report; finished steps are taken as they are."""
    if run.config.teacher_output != LIVE:
        read_output(run.config.teacher_output)
    add_seconds(run.workdir, "start", run.seconds)
    align(run)
    select_layers(run)
    distill(run)
    finetune(run)
    fit(run)
    export(run)
    evaluate(run)
    report = run.workdir / "report" / "index.html"
    first(lambda: write_report(run.workdir))
    run.reporter.message(f"the report is {report}")
    return report


def align(run: Run) -> dict:
    """Stage 1. Returns the Lightning mixers of all layers, {"layer_i": parameters}."""
    student, params = transferred(run, ())
    num_layers = student.config.num_layers
    mixers = mixers_of(params, num_layers)
    axes = mixers_of(student.param_axes(), num_layers)
    return _train(run, "align", alignment_loss(run.teacher, student), student, mixers, axes, run.frozen)


def select_layers(run: Run) -> tuple[int, ...]:
    """Which layers keep attention: given, read from a table of scores, or measured. Written to select.json."""
    config, path = run.config, run.workdir / "select.json"
    if path.is_file():
        return tuple(read_json(path)["layers"])
    num_layers = run.teacher.config.num_layers
    scores: dict = {}
    with timed(run.workdir, "select"):
        if config.student.attention_layers is not None:
            method, layers = "given", tuple(sorted(set(config.student.attention_layers)))
        else:
            method = config.select.method
            if config.select.scores is not None:
                scores = select.read_scores(config.select.scores, num_layers)
            elif method in select.NEEDS:
                scores = _scores(run, method)
            layers = select.choose(scores, num_layers, method, config.select.keep)
        found = {"method": method, "layers": list(layers), **scores}
        if method in select.NEEDS:
            found["scores"] = select.importance_of(scores, method).tolist()
        write_json(path, found)
    run.reporter.message(f"select  attention stays in layers {', '.join(map(str, layers)) or 'none'} ({method})")
    return tuple(layers)


def distill(run: Run) -> dict:
    """Stage 2. Returns the student's parameters after it."""
    student, params = start_student(run)
    chunk, axes = run.config.distill.token_chunk, student.param_axes()
    if run.config.teacher_output == LIVE:
        loss = distillation_loss(run.teacher, student, chunk, dataclasses.asdict(run.config.objective))
        return _train(run, "distill", loss, student, params, axes, run.frozen)
    beside = teacher_cache.rows_for(pathlib.Path(run.config.teacher_output), _teacher_output(run))
    loss = cached_distillation_loss(run.teacher, student, chunk, beside.output.form)
    head = "embedding" if run.teacher.config.tie_embeddings else "lm_head"
    frozen = {head: run.teacher_params[head].astype(run.config.dtype)} if beside.output.form == "hidden" else None
    return _train(run, "distill", loss, student, params, axes, frozen, beside)


def cache_teacher(run: Run, form: str = "hidden", k: int | None = None) -> pathlib.Path:
    """The teacher's output for stage 2, W/teacher_output: last hidden states, or the k likeliest tokens."""
    if run.config.data.documents != "masked":
        raise HypenetError("data.documents is 'joined' but a kept teacher output is of masked documents; use 'masked'")
    vocab = run.teacher.config.vocab_size
    if form == "top-k" and (k is None or not 1 <= k <= vocab):
        raise HypenetError(f"k is {k}; --form top-k needs --k between 1 and the {vocab} tokens of the vocabulary")
    if form != "top-k" and k is not None:
        raise HypenetError(f"k is {k} but the form is {form!r}; --k goes with --form top-k")
    directory, output = run.workdir / teacher_cache.DIRECTORY, _teacher_output(run, k)
    with timed(run.workdir, "cache-teacher"):
        teacher_cache.write(
            directory,
            output,
            run.teacher,
            run.frozen,
            run.text,
            run.config.distill.batch_size,
            run.mesh,
            run.reporter.message,
        )
    run.reporter.message(f"cache-teacher  done; `--set teacher_output={directory}` makes distill read it")
    return directory


def _teacher_output(run: Run, top_k: int | None = None) -> TeacherOutput:
    """What the output of this run's teacher for stage 2 is."""
    made_by = teacher_cache.fingerprint(run.teacher, run.teacher_params)
    start = corpus.stage_start(run.config, "distill")
    return teacher_cache.output_of(run.teacher, made_by, run.text, run.config.distill, start, top_k)


def finetune(run: Run) -> dict:
    """Stage 3. Returns the student's parameters after it."""
    student = student_of(run)
    params = finished(run, "distill")
    loss = next_token_loss(student, run.config.finetune.token_chunk)
    return _train(run, "finetune", loss, student, params, student.param_axes(), None)


def fit(run: Run) -> float:
    """Step 5: the a of s_t, written to fit_scale.json with its whole grid."""
    path, settings = run.workdir / "fit_scale.json", run.config.fit_scale
    if not path.is_file():
        student, params = student_of(run), finished(run, "finetune")
        with timed(run.workdir, "fit_scale"):
            windows = corpus.long_documents(run.heldout, settings.length, settings.documents)
            between = partial(stop_if_asked, run.reporter.message, "fit_scale")
            fitted = fit_scale(
                student, params, windows, settings.grid, settings.batch_size, between, settings.tolerance
            )
            write_json(path, fitted)
    fitted = read_json(path)
    run.reporter.message(
        f"fit_scale  a = {fitted['a']:.4g} (loss {min(fitted['loss']):.4f}, unscaled {fitted['loss_unscaled']:.4f}, "
        f"{fitted['documents']} documents of {fitted['length']} tokens)"
    )
    return fitted["a"]


def export(run: Run) -> pathlib.Path:
    """The student with its fitted scaling and its model card as a Hugging Face directory, W/export."""
    student, params = finished_student(run)
    directory = run.workdir / EXPORT
    stop_if_asked(run.reporter.message, "export")
    first(lambda: remove_partial(directory))
    with timed(run.workdir, "export"):
        hub.save(student, params, directory, EXPORT_DTYPE, card=card(run, student))
    run.reporter.message(f"export  {directory}")
    return directory


def _scores(run: Run, method: str) -> dict:
    """The scores that the method ranks layers by, measured or learned."""
    mixers = finished(run, "align")
    if method == "gate-search":
        return {"gate": GateSearch(run, mixers).search(run.config.seed, run.workdir / "select")["gate"]}
    return measured(run, mixers, run.config.seed, restored=method == "kl-ls-restored")


def measured(run: Run, mixers: dict, seed: int, *, restored: bool, costs: dict | None = None) -> dict:
    """The scores of all variants on the probes that `seed` draws; with `restored` those of KL-LS's direction too."""
    settings, params = run.config.select, run.teacher_params
    rows, choices = probes(settings, run.tokenizer, run.heldout, seed)
    student = student_model(run, ())

    def report(layer: int, scores: dict) -> None:
        run.reporter.message(
            f"select  without the attention of layer {layer}: recall {scores['recall']:.3f}, "
            f"choice {scores['csr']:.3f}, KL {scores['kl']:.4f}"
        )
        stop_if_asked(run.reporter.message, "select")

    common: dict = {"recall_rows": rows, "batch_size": settings.batch_size, "costs": costs}
    scores = variants.measure(run.teacher, params, student, mixers, choices=choices, report=report, **common)
    if restored:
        scores["restored_kl"] = restored_kl(run, mixers, seed, costs)
    return scores


def restored_kl(run: Run, mixers: dict, seed: int, costs: dict | None = None) -> list[float]:
    """The scores of KL-LS's direction alone, on the probes that `seed` draws."""
    settings, params = run.config.select, run.teacher_params
    rows, _ = probes(settings, run.tokenizer, run.heldout, seed)
    return variants.measure_restored(
        run.teacher,
        params,
        student_model(run, ()),
        mixers,
        recall_rows=rows,
        batch_size=settings.batch_size,
        between=partial(stop_if_asked, run.reporter.message, "select"),
        costs=costs,
    )


def _train(run: Run, name: str, loss, student: LanguageModel, params, axes, frozen, beside=None) -> dict:
    stage: StageConfig = getattr(run.config, name)
    completions = name == "finetune" and run.config.finetune_loss == "completions"
    seed, workers = run.config.seed, run.config.data.workers
    joined = run.config.data.documents == "joined"
    text, start = run.text_of(name), corpus.stage_start(run.config, name)
    batches = corpus.stage_batches(text, stage, start, seed, workers, run.mesh, completions, beside, joined)
    with timed(run.workdir, name):
        trained, _ = train(
            name=name,
            loss_fn=loss,
            params=params,
            frozen=frozen,
            batches=batches,
            stage=stage,
            directory=run.workdir / name,
            mesh=run.mesh,
            param_shardings=param_shardings(axes, params, run.mesh, rules_of(run.config.rules)),
            model_info=config_to_dict(student.config),
            reporter=run.reporter,
            config=to_mapping(run.config),
        )
    return trained
