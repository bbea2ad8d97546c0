"""`hypenet ablate`: controlled comparisons of recipes, variants x seeds of short stages from one shared base."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypenet_jax.config import differences, to_mapping
from hypenet_jax.data.batches import batch_of
from hypenet_jax.evals import studies as statistics
from hypenet_jax.evals import suite
from hypenet_jax.evals.report_studies import write_study
from hypenet_jax.halo import corpus, pipeline
from hypenet_jax.halo.align import alignment_loss, mixers_of, with_mixers
from hypenet_jax.halo.distill import EXACT_KL, distillation_loss
from hypenet_jax.halo.precheck import section
from hypenet_jax.halo.run import Run, start_student, student_of, transferred
from hypenet_jax.halo.studies import STUDIES, Study, Variant, check, stage_of, steps_of
from hypenet_jax.halo.workdir import made_by, read_json, timed, write_json
from hypenet_jax.model import LanguageModel
from hypenet_jax.parallel.processes import first, own_rows
from hypenet_jax.parallel.rules import batch_sharding, param_shardings, replicated, rules_of
from hypenet_jax.train.loop import place_batch
from hypenet_jax.train.losses import distill_loss, lm_loss
from hypenet_jax.train.optim import learning_rate
from hypenet_jax.train.preemption import stop_if_asked
from hypenet_jax.train.stage import FREE_FIELDS, StageConfig
from hypenet_jax.train.step import abstract_state, create_state, update

DIRECTORY, RESULT = "studies", "result.json"
# What of a cell's stages does not change its numbers.
_FREE = tuple(f"stages.{stage}.{field}" for stage in ("align", "distill") for field in FREE_FIELDS)


def ablate(run: Run, names: Sequence[str]) -> list[pathlib.Path]:
    """Run the named studies, W/studies/<name>/; the pages' paths. Finished cells are taken as they are.

    The base is made where it is missing: stage 1 and the layer selection of the run's config.
    """
    _check(run, names)
    pipeline.align(run)
    pipeline.select_layers(run)
    bench = Bench(run)
    return [_study(bench, STUDIES[name]) for name in names]


def _check(run: Run, names: Sequence[str]) -> None:
    """Raise HypenetError for what could not be done later on: cells, and the needles that finished ones are asked."""
    for name in names:
        check(STUDIES[name], run.config)
    settings = run.config.ablate
    if settings.needle_lengths:
        with section("ablate"):
            essays = run.config.evaluate.essays or corpus.heldout_prose(run.heldout, run.tokenizer)
            suite.needle_samples(
                run.tokenizer,
                run.config.evaluate,
                settings.needle_task,
                min(settings.needle_lengths),
                essays,
                run.config.seed,
            )


def _study(bench: Bench, study: Study) -> pathlib.Path:
    run, directory = bench.run, bench.run.workdir / DIRECTORY / study.name
    cells = []
    with timed(run.workdir, f"ablate {study.name}"):
        for number in range(run.config.ablate.seeds):
            for variant in study.variants:
                cells.append(_cell(bench, study, variant, number, directory / "cells"))
    found = statistics.result(study.name, study.question, _described(study), cells) | {
        **made_by(),
        "seconds": round(sum(cell["seconds"] for cell in cells), 1),
        "layers": list(bench.layers),
        "config": json.loads(json.dumps(to_mapping(run.config))),
    }
    write_json(directory / RESULT, found)
    first(lambda: write_study(directory))
    page = directory / "index.html"
    run.reporter.message(f"ablate {study.name}  {page}")
    return page


def _described(study: Study) -> list[dict[str, Any]]:
    """The variants as the result names them."""
    pairs = [(variant, study.against(variant)) for variant in study.variants]
    return [{"name": v.name, "label": v.label, "against": other and other.name} for v, other in pairs]


def _cell(bench: Bench, study: Study, variant: Variant, number: int, directory: pathlib.Path) -> dict[str, Any]:
    """One variant with one seed: read where it was run with the same settings, else run and written."""
    run, path = bench.run, directory / f"{variant.name}-{number}.json"
    settings = json.loads(json.dumps(_settings(bench, study, variant, number)))
    if path.is_file():
        kept = read_json(path)
        before = kept.get("settings") if isinstance(kept, dict) else None
        if isinstance(before, dict) and not differences(before, settings, _FREE):
            return kept
        run.reporter.message(f"ablate {study.name}  {path.name} is of other settings and is run again")
    started = time.monotonic()
    measured = bench.trained(study, variant, number)
    cell = {"settings": settings, **measured, "seconds": round(time.monotonic() - started, 2)}
    write_json(path, cell)
    last = cell["distill"][-1]
    run.reporter.message(
        f"ablate {study.name}  {variant.name} seed {number}: KL {_words(last['kl'])}, loss {_words(last['nll'])} "
        f"after {last['tokens']:,} tokens, {cell['seconds']:.0f} s"
    )
    return cell


def _words(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _settings(bench: Bench, study: Study, variant: Variant, number: int) -> dict[str, Any]:
    """Everything that a cell's numbers follow from, beside the work directory's own config."""
    config = bench.run.config
    stages = {
        name: dataclasses.asdict(stage_of(config, name, steps, variant)) | {"token_chunk": None}
        for name, steps in zip(("align", "distill"), steps_of(study, variant, config.ablate), strict=True)
        if steps
    }
    ablate, evaluate = config.ablate, config.evaluate
    asked = ("samples", "depths", "essays", "answer", "answer_budget", "alternatives")
    needles = [ablate.needle_task, ablate.needle_lengths, *(getattr(evaluate, name) for name in asked)]
    return {
        "variant": dataclasses.asdict(dataclasses.replace(variant, label="", against=None)),
        "seed": config.seed + number,
        "number": number,
        "layers": list(bench.layers),
        "stages": stages,
        "measured": [ablate.measure_every, ablate.heldout_rows],
        "needles": needles if ablate.needle_lengths else [],
        "devices": dict(bench.run.mesh.shape),
        "dtype": config.dtype,
    }


class Bench:
    """What all cells share: the base, and the compiled programs, which differ by shapes and dtypes alone."""

    def __init__(self, run: Run):
        self.run, self.frozen = run, run.frozen
        self.layers: tuple[int, ...] = tuple(read_json(run.workdir / "select.json")["layers"])
        self.student = student_of(run)
        self.rnn = transferred(run, ())[0]
        self._essays: list[str] | None = None
        chunk = run.config.distill.token_chunk
        self._alignment = alignment_loss(run.teacher, self.rnn)
        self._measure_align = jax.jit(self._alignment)
        self._measure_distill = jax.jit(functools.partial(_divergence, run.teacher, self.student, chunk))
        self._steps: dict[Any, Any] = {}
        self._rows: dict[tuple[int, int], list[dict]] = {}

    def trained(self, study: Study, variant: Variant, number: int) -> dict[str, Any]:
        """The held-out curves of a cell: {"align": [{"tokens", "mse"}], "distill": [{"tokens", "kl", "nll"}], ..}."""
        run, seed = self.run, self.run.config.seed + number
        align, distill = steps_of(study, variant, run.config.ablate)
        each = stage_of(run.config, "distill", distill, variant).tokens_per_step
        start = corpus.stage_start(run.config, "distill") + number * (align + distill) * each
        found: dict[str, Any] = {"align": []}
        if study.aligns:
            student, params = transferred(run, self.layers, variant.start, seed)
            mixers = mixers_of(transferred(run, (), variant.start, seed)[1], self.rnn.config.num_layers)
            if align:
                stage = stage_of(run.config, "align", align, variant)
                mixers, found["align"] = self._phase("align", study, variant, stage, mixers, start, seed, 0)
            kept = [f"layer_{i}" for i, mixer in enumerate(student.config.mixers) if mixer == "lightning"]
            params = with_mixers(params, {name: mixers[name] for name in kept})
        else:
            params = self._aligned
        stage = stage_of(run.config, "distill", distill, variant)
        params, found["distill"] = self._phase(
            "distill", study, variant, stage, params, start + align * each, seed, align * each
        )
        return found | {"needles": self._needles(params)}

    @functools.cached_property
    def _aligned(self) -> dict:
        """The student as stage 2 of the base starts it."""
        return start_student(self.run)[1]

    def _phase(
        self, name: str, study: Study, variant: Variant, stage: StageConfig, params, start: int, seed: int, before: int
    ) -> tuple[dict, list[dict]]:
        """A stage of a cell from `params` on: (trained parameters, measurements by tokens, counted from `before`)."""
        run, settings = self.run, self.run.config.ablate
        joined = variant.documents == "joined"
        batches = corpus.stage_batches(run.text, stage, start, seed, run.config.data.workers, run.mesh, joined=joined)
        abstract = self._abstract(name, stage, params)
        state = create_state(params, stage, abstract)
        step, rates = self._step(name, study, stage, abstract), self._rates(stage)
        frozen = {"teacher": self.frozen, "objective": self._objective(study, variant) if name == "distill" else {}}
        curve = [{"tokens": before, **self._measure(name, state["params"], stage)}]
        for done in range(1, stage.steps + 1):
            stop_if_asked(run.reporter.message, f"ablate {study.name}")
            batch = place_batch(next(batches), stage, run.mesh)
            with jax.set_mesh(run.mesh):
                state, _ = step(state, frozen, rates, batch)
            if done % settings.measure_every == 0 or done == stage.steps:
                measured = self._measure(name, state["params"], stage)
                curve.append({"tokens": before + done * stage.tokens_per_step, **measured})
                if None in measured.values():
                    break
        batches.close()
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state["params"]), curve

    def _abstract(self, name: str, stage: StageConfig, params: dict) -> dict[str, Any]:
        axes = self.student.param_axes()
        if name == "align":
            axes = mixers_of(self.rnn.param_axes(), self.rnn.config.num_layers)
        shardings = param_shardings(axes, params, self.run.mesh, rules_of(self.run.config.rules))
        return abstract_state(params, stage, shardings, self.run.mesh)

    def _step(self, name: str, study: Study, stage: StageConfig, abstract: dict[str, Any]):
        """The jitted update (state, frozen, rates, batch) -> (state, metrics), one for all cells that can share it."""
        fields = study.objective_fields if name == "distill" else ()
        # The rates are an argument of the program: stages of other lengths and rates share it.
        alike: dict[str, Any] = {"steps": 1, "warmup_steps": 0, "peak_lr": 1.0, "end_lr": 1.0, "schedule": "constant"}
        key = (name, fields, dataclasses.replace(stage, **alike))
        if key not in self._steps:
            mesh, shardings = self.run.mesh, jax.tree.map(lambda leaf: leaf.sharding, abstract)
            loss = self._align_loss if name == "align" else self._distill_loss

            def one(state, frozen, rates, batch):
                return update(loss, stage, mesh, state, frozen, batch, schedule=lambda n: rates[n - 1])

            self._steps[key] = jax.jit(
                one,
                in_shardings=(shardings, None, replicated(mesh), batch_sharding(mesh)),
                out_shardings=(shardings, replicated(mesh)),
                donate_argnums=(0,),
            )
        return self._steps[key]

    def _align_loss(self, params: dict, frozen: dict, batch: dict):
        return self._alignment(params, frozen["teacher"], batch)

    def _distill_loss(self, params: dict, frozen: dict, batch: dict):
        chunk, objective = self.run.config.distill.token_chunk, EXACT_KL | frozen["objective"]
        return distillation_loss(self.run.teacher, self.student, chunk, objective)(params, frozen["teacher"], batch)

    def _objective(self, study: Study, variant: Variant) -> dict[str, np.ndarray]:
        values = dataclasses.asdict(variant.objective)
        return {
            name: np.asarray(values[name], np.int32 if isinstance(values[name], int) else np.float32)
            for name in study.objective_fields
        }

    def _rates(self, stage: StageConfig) -> np.ndarray:
        """The learning rate of every update, as long as the longest stage of any cell: one shape for all."""
        settings = self.run.config.ablate
        schedule = learning_rate(stage)
        rates = np.zeros(settings.align_steps + settings.distill_steps, np.float32)
        rates[: stage.steps] = [float(schedule(n)) for n in range(1, stage.steps + 1)]
        return rates

    def _measure(self, name: str, params: dict, stage: StageConfig) -> dict[str, float | None]:
        """Means over the held-out rows: {"mse"} of alignment, or {"kl", "nll"}, whatever was trained on."""
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        measure = self._measure_align if name == "align" else self._measure_distill
        totals: dict[str, float] = {}
        counts: dict[str, float] = {}
        for batch in self._heldout(stage):
            with jax.set_mesh(self.run.mesh):
                value, metrics = measure(params, self.frozen, place_batch(batch, stage, self.run.mesh))
            found = {"mse": (value, metrics["count"])} if name == "align" else metrics
            for key, (mean, count) in found.items():
                totals[key] = totals.get(key, 0.0) + float(mean) * float(count)
                counts[key] = counts.get(key, 0.0) + float(count)
        means = {key: totals[key] / max(counts[key], 1.0) for key in totals}
        return {key: mean if math.isfinite(mean) else None for key, mean in means.items()}

    def _heldout(self, stage: StageConfig) -> list[dict]:
        """This process's rows of batches of the first held-out rows; the last is filled up with padding."""
        size = (stage.batch_size, stage.seq_len)
        if size not in self._rows:
            batch, length = size
            heldout = self.run.heldout
            rows = max(1, min(self.run.config.ablate.heldout_rows, len(heldout) // length))
            self._rows[size] = []
            own = own_rows(batch_sharding(self.run.mesh), batch, length)
            for low in range(0, rows, batch):
                starts = np.minimum(np.arange(low, low + batch), rows - 1).astype(np.int64) * length
                made = batch_of(*heldout.rows(starts, length + 1))
                extra = np.arange(low, low + batch) >= rows
                made["segment_ids"][extra], made["loss_mask"][extra] = -1, False
                self._rows[size].append({name: array[own] for name, array in made.items()})
        return self._rows[size]

    def _needles(self, params: dict) -> list[dict]:
        """Needles asked of the finished cell, the same of all; [] where none are wanted."""
        config = self.run.config
        if not config.ablate.needle_lengths:
            return []
        if self._essays is None:
            self._essays = corpus.heldout_prose(self.run.heldout, self.run.tokenizer)
        essays = config.evaluate.essays or self._essays
        rows = []
        for length in config.ablate.needle_lengths:
            stop_if_asked(self.run.reporter.message, "ablate")
            task, settings = config.ablate.needle_task, config.evaluate
            found = suite.needles(self.student, params, self.run.tokenizer, settings, task, length, essays, config.seed)
            right, total = (sum(row[key] for row in found) for key in ("correct", "total"))
            rows.append({"task": found[0]["task"], "length": length, "correct": right, "total": total})
        return rows


def _divergence(
    teacher: LanguageModel, student: LanguageModel, chunk: int | None, params: dict, teacher_params: dict, batch: dict
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """(KL(teacher || student), {"kl", "nll": (mean in nats a token, tokens)}), documents apart."""
    wanted = teacher.hidden(teacher_params, batch["tokens"], batch["segment_ids"])
    got, head = student.hidden(params, batch["tokens"], batch["segment_ids"]), student.head(params)
    kl, all_tokens = distill_loss(got, head, wanted, teacher.head(teacher_params), batch, token_chunk=chunk)
    nll, targets = lm_loss(got, head, batch, token_chunk=chunk)
    return kl, {"kl": (kl, all_tokens["count"]), "nll": (nll, targets["count"])}
