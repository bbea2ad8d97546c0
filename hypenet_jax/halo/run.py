"""A run of HALO: what every step needs, opened and checked, and the student as each step finds it."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from hypenet_jax import hub
from hypenet_jax.data.packing import PackedTokens
from hypenet_jax.errors import HypenetError
from hypenet_jax.halo import corpus, precheck, transfer
from hypenet_jax.halo.align import mixers_of, with_mixers
from hypenet_jax.halo.settings import ConvertConfig
from hypenet_jax.halo.workdir import DATA, claim, read_json
from hypenet_jax.model import LanguageModel
from hypenet_jax.parallel.mesh import check_compute_dtype, make_mesh
from hypenet_jax.parallel.processes import place
from hypenet_jax.parallel.rules import param_shardings, rules_of
from hypenet_jax.train.checkpoint import load_params, read_latest
from hypenet_jax.train.metrics import ReporterLike

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
    finetune_text: PackedTokens | None = None  # stage 3's own; None: it goes on in `text`

    @property
    def tokenizer(self):
        """The teacher's tokenizer; `open_run` has checked that there is one."""
        return self.teacher.tokenizer

    def text_of(self, stage: str) -> PackedTokens:
        """The text that a stage reads, from `corpus.stage_start` on."""
        return self.finetune_text if self.finetune_text and stage == "finetune" else self.text

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
    tokenizer = teacher.tokenizer
    if tokenizer is None:
        raise HypenetError(f"the teacher {config.teacher} has no tokenizer.json; put one beside its weights")
    precheck.check_plan(config, teacher.config, mesh)
    with precheck.section("teacher_rules"):
        teacher, params = spread(config, mesh, teacher, params, config.teacher_rules)
    path = claim(workdir, config)
    text, heldout = corpus.packed_corpus(config.data, tokenizer, path / DATA, reporter.message)
    own = None
    if config.finetune_sources:
        own = corpus.finetune_corpus(config.data, config.finetune_sources, tokenizer, path / DATA, reporter.message)
    precheck.check_text(config, tokenizer, text, heldout, own)
    opened = time.monotonic() - start
    return Run(config, path, mesh, teacher, params, text, heldout, reporter, command, opened, own)


def spread(
    config: ConvertConfig, mesh: Mesh, model: LanguageModel, params: dict, rules: Mapping[str, Sequence[str]]
) -> tuple[LanguageModel, dict]:
    """A loaded model as the run computes with it, its parameters over the mesh; HypenetError where axes do not fit."""
    model = dataclasses.replace(model, dtype=config.dtype, remat=config.remat, exchange=config.exchange)
    shardings = param_shardings(model.param_axes(), params, mesh, rules_of(rules))
    return model, jax.tree.map(place, params, shardings)


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
    aligned = finished(run, "align")
    return student, with_mixers(params, {name: aligned[name] for name in sorted(chosen)})


def finished_student(run: Run) -> tuple[LanguageModel, dict]:
    """The student after stage 3, with the fitted scaling where positions need it."""
    fitted = read_json(run.workdir / "fit_scale.json")["a"]
    return student_of(run).with_logits_scaling(fitted), finished(run, "finetune")


def finished(run: Run, name: str) -> dict:
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
