"""HALO from a teacher to an evaluated, exported student: the order of the steps, each of them resumable."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from hypenet_jax import hub
from hypenet_jax.config import to_mapping
from hypenet_jax.data.packing import PackedTokens
from hypenet_jax.data.teacher_rows import TeacherOutput, read_output
from hypenet_jax.errors import HypenetError
from hypenet_jax.evals import suite
from hypenet_jax.evals.card import run_card
from hypenet_jax.evals.report import SCALE_NEEDLES, write_report
from hypenet_jax.halo import corpus, precheck, select, teacher_cache, transfer, variants
from hypenet_jax.halo.align import alignment_loss, mixers_of, with_mixers
from hypenet_jax.halo.distill import cached_distillation_loss, distillation_loss
from hypenet_jax.halo.finetune import next_token_loss
from hypenet_jax.halo.fit_scale import fit_scale
from hypenet_jax.halo.gate_search import GateSearch
from hypenet_jax.halo.probes import probes
from hypenet_jax.halo.scale_needles import scale_needles
from hypenet_jax.halo.settings import ConvertConfig
from hypenet_jax.halo.workdir import DATA, add_seconds, claim, read_json, timed, write_json
from hypenet_jax.hub.card import CARD, replace_card
from hypenet_jax.model import LanguageModel
from hypenet_jax.model.serialize import config_to_dict
from hypenet_jax.parallel.mesh import check_compute_dtype, make_mesh
from hypenet_jax.parallel.processes import first, place
from hypenet_jax.parallel.rules import param_shardings, rules_of
from hypenet_jax.train.checkpoint import load_params, read_latest
from hypenet_jax.train.loop import train
from hypenet_jax.train.metrics import ReporterLike
from hypenet_jax.train.preemption import EXIT_PREEMPTED, Preemption
from hypenet_jax.train.stage import StageConfig

EXPORT, EXPORT_DTYPE = "export", "float32"
# `teacher_output` of a config: the teacher runs beside the student.
LIVE = "live"
# Tokens that the calibrated start measures output norms on.
CALIBRATION_ROWS, CALIBRATION_LENGTH = 8, 512


@dataclasses.dataclass(frozen=True)
class Run:
    """What every step needs: the config, its work directory, the frozen teacher, and the text."""

    config: ConvertConfig
    workdir: pathlib.Path
    mesh: Mesh
    teacher: LanguageModel
    teacher_params: dict  # float32 masters; the steps' compute dtype is the model's
    text: PackedTokens
    heldout: PackedTokens
    reporter: ReporterLike
    command: str | None = None  # what does the whole run again, for the model card
    seconds: float = 0.0  # what opening took

    @property
    def tokenizer(self):
        """The teacher's tokenizer; `open_run` has checked that there is one."""
        return self.teacher.tokenizer

    @property
    def frozen(self) -> dict:
        """The teacher's weights as the training steps read them: in the compute dtype, spread over the mesh."""
        return jax.tree.map(lambda leaf: leaf.astype(self.config.dtype), self.teacher_params)


def open_run(
    config: ConvertConfig, workdir: str | os.PathLike, reporter: ReporterLike, command: str | None = None
) -> Run:
    """Check everything that can be wrong before any work: mesh, teacher, directory, text."""
    start = time.monotonic()
    mesh = make_mesh(config.mesh or None)
    check_compute_dtype(config.dtype)
    teacher, params = hub.load(config.teacher)
    teacher = dataclasses.replace(teacher, dtype=config.dtype, remat=config.remat, exchange=config.exchange)
    if teacher.tokenizer is None:
        raise HypenetError(f"the teacher {config.teacher} has no tokenizer.json; put one beside its weights")
    precheck.check_plan(config, teacher.config, mesh)
    with precheck.section("teacher_rules"):
        shardings = param_shardings(teacher.param_axes(), params, mesh, rules_of(config.teacher_rules))
    params = jax.tree.map(place, params, shardings)
    path = claim(workdir, config)
    text, heldout = corpus.packed_corpus(config.data, teacher.tokenizer, path / DATA, reporter.message)
    precheck.check_text(config, teacher.tokenizer, text, heldout)
    opened = time.monotonic() - start
    return Run(config, path, mesh, teacher, params, text, heldout, reporter, command, opened)


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
    return _train(run, "align", alignment_loss(run.teacher, student), student, mixers, axes, run.frozen, start_token=0)


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
                scores = select.read_scores(config.select.scores)
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
    chunk, axes, start = run.config.distill.token_chunk, student.param_axes(), corpus.stage_tokens(run.config.align)
    if run.config.teacher_output == LIVE:
        loss = distillation_loss(run.teacher, student, chunk, dataclasses.asdict(run.config.objective))
        return _train(run, "distill", loss, student, params, axes, run.frozen, start)
    beside = teacher_cache.rows_for(pathlib.Path(run.config.teacher_output), _teacher_output(run))
    loss = cached_distillation_loss(run.teacher, student, chunk, beside.output.form)
    head = "embedding" if run.teacher.config.tie_embeddings else "lm_head"
    frozen = {head: run.teacher_params[head].astype(run.config.dtype)} if beside.output.form == "hidden" else None
    return _train(run, "distill", loss, student, params, axes, frozen, start, beside)


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
    start = corpus.stage_tokens(run.config.align)
    return teacher_cache.output_of(run.teacher, made_by, run.text, run.config.distill, start, top_k)


def finetune(run: Run) -> dict:
    """Stage 3. Returns the student's parameters after it."""
    student = student_of(run)
    params = _finished(run, "distill")
    start = corpus.stage_tokens(run.config.align) + corpus.stage_tokens(run.config.distill)
    loss = next_token_loss(student, run.config.finetune.token_chunk)
    return _train(run, "finetune", loss, student, params, student.param_axes(), None, start)


def fit(run: Run) -> float:
    """Step 5: the a of s_t, written to fit_scale.json with its whole grid."""
    path, settings = run.workdir / "fit_scale.json", run.config.fit_scale
    if not path.is_file():
        student, params = student_of(run), _finished(run, "finetune")
        with timed(run.workdir, "fit_scale"):
            windows = corpus.long_documents(run.heldout, settings.length, settings.documents)
            fitted = fit_scale(student, params, windows, settings.grid, settings.batch_size)
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
    with timed(run.workdir, "export"):
        hub.save(student, params, directory, EXPORT_DTYPE, card=_card(run, student))
    run.reporter.message(f"export  {directory}")
    return directory


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
    windows = corpus.long_documents(run.heldout, settings.perplexity_length, settings.perplexity_documents)
    essays = settings.essays or corpus.heldout_prose(run.heldout, run.tokenizer)
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


def student_of(run: Run) -> LanguageModel:
    """The hybrid whose layers `select` chose, without scaling."""
    return student_model(run, read_json(run.workdir / "select.json")["layers"])


def student_model(run: Run, attention_layers: Sequence[int]) -> LanguageModel:
    """The hybrid that keeps attention in these layers, without scaling."""
    wanted = run.config.student
    config = transfer.student_of(run.teacher.config, attention_layers, wanted.position, wanted.qk_norm)
    return dataclasses.replace(run.teacher, config=config)


def start_student(run: Run) -> tuple[LanguageModel, dict]:
    """The hybrid as stage 2 starts it: transferred attention layers, stage-1 Lightning layers."""
    layers = read_json(run.workdir / "select.json")["layers"]
    student, params = transferred(run, layers)
    chosen = {f"layer_{i}" for i, mixer in enumerate(student.config.mixers) if mixer == "lightning"}
    aligned = _finished(run, "align")
    return student, with_mixers(params, {name: aligned[name] for name in sorted(chosen)})


def finished_student(run: Run) -> tuple[LanguageModel, dict]:
    """The student after stage 3, with the fitted scaling where positions need it."""
    fitted = read_json(run.workdir / "fit_scale.json")["a"]
    return student_of(run).with_logits_scaling(fitted), _finished(run, "finetune")


def _card(run: Run, student: LanguageModel) -> str:
    return run_card(run.workdir, student.config, EXPORT_DTYPE, run.command)


def _renew_card(run: Run, student: LanguageModel) -> None:
    """The scores into the card of the export, where there is one; a card that somebody has edited stays."""
    directory = run.workdir / EXPORT
    if directory.is_dir() and not replace_card(directory, _card(run, student)):
        run.reporter.message(f"evaluate  {directory / CARD} was edited and is left as it is")


def transferred(
    run: Run, attention_layers, start: str | None = None, seed: int | None = None
) -> tuple[LanguageModel, dict]:
    """The student right after the weight transfer, calibrated on the first tokens of the training text.

    start and seed are the config's where None.
    """
    tokens, _ = run.text.slice(0, CALIBRATION_ROWS * CALIBRATION_LENGTH)
    rows = np.asarray(tokens, np.int32).reshape(CALIBRATION_ROWS, CALIBRATION_LENGTH)
    settings = run.config.student
    start, seed = start or settings.start, run.config.seed if seed is None else seed
    layers, qk_norm = attention_layers, settings.qk_norm
    return transfer.convert(run.teacher, run.teacher_params, layers, settings.position, start, seed, rows, qk_norm)


def _scores(run: Run, method: str) -> dict:
    """The scores that the method ranks layers by, measured or learned."""
    mixers = _finished(run, "align")
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

    common: dict = {"recall_rows": rows, "batch_size": settings.batch_size, "costs": costs}
    scores = variants.measure(run.teacher, params, student, mixers, choices=choices, report=report, **common)
    if restored:
        scores["restored_kl"] = variants.measure_restored(run.teacher, params, student, mixers, **common)
    return scores


def _train(
    run: Run, name: str, loss, student: LanguageModel, params, axes, frozen, start_token: int, beside=None
) -> dict:
    stage: StageConfig = getattr(run.config, name)
    completions = name == "finetune" and run.config.finetune_loss == "completions"
    seed, workers = run.config.seed, run.config.data.workers
    joined = run.config.data.documents == "joined"
    batches = corpus.stage_batches(run.text, stage, start_token, seed, workers, run.mesh, completions, beside, joined)
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


def _finished(run: Run, name: str) -> dict:
    """The parameters of a finished stage; HypenetError when it has not run to its end."""
    directory, steps = run.workdir / name, getattr(run.config, name).steps
    latest = read_latest(directory)
    if latest is None or latest["step"] < steps:
        at = "has not started" if latest is None else f"stands at step {latest['step']} of {steps}"
        raise HypenetError(f"stage {name} in {directory} {at}; run `hypenet {name}` to its end first")
    if name == "align":
        student = student_model(run, ())
        axes, shapes = (mixers_of(t, student.config.num_layers) for t in (student.param_axes(), student.param_shapes()))
    else:
        student = student_of(run)
        axes, shapes = student.param_axes(), student.param_shapes()
    return load_params(directory, param_shardings(axes, shapes, run.mesh, rules_of(run.config.rules)))[1]
