"""`hypenet compare-selection`: every way to choose the layers, and what a short equal distillation makes of each.

One aligned work directory serves all. Everything is compiled once, whatever layers are chosen (`either.py`), and kept
as soon as it is there: probes and searches by seed, students by their layers.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from hypenet_jax.config import differences
from hypenet_jax.errors import HypenetError
from hypenet_jax.evals import suite
from hypenet_jax.evals.selection_table import selection_table, write_selection
from hypenet_jax.halo import corpus, pipeline, precheck, select
from hypenet_jax.halo.align import with_mixers
from hypenet_jax.halo.either import EitherModel, either_loss, either_tree
from hypenet_jax.halo.gate_search import GateSearch
from hypenet_jax.halo.run import Run, transferred
from hypenet_jax.halo.settings import EvaluateConfig
from hypenet_jax.halo.workdir import read_json, timed, write_json
from hypenet_jax.model.serialize import config_to_dict
from hypenet_jax.parallel.processes import first
from hypenet_jax.parallel.rules import param_shardings, rules_of
from hypenet_jax.train.checkpoint import DIRECTORY as CHECKPOINTS
from hypenet_jax.train.loop import check_rows, train
from hypenet_jax.train.preemption import stop_if_asked
from hypenet_jax.train.stage import FREE_FIELDS, StageConfig
from hypenet_jax.train.step import abstract_state, make_step

SELECTION = "selection"
PROBED = ("csr", "recall", "kl", "restored_kl")


def compare(run: Run) -> pathlib.Path:
    """W/selection/table.json and index.html; what an earlier call has finished is taken as it is."""
    directory, config = run.workdir / SELECTION, run.config.compare
    _check(run)
    mixers = pipeline.align(run)
    _claim(directory, _settings(run))
    with timed(directory, "all, with starts and compiling"):
        choices = _choices(run, mixers, directory)
        # In the order of the choices, so that a comparison cut short is whole for its first seeds.
        layer_sets = list(dict.fromkeys(tuple(choice["layers"]) for choice in choices))
        said = f"{len(config.methods)} methods with {len(config.seeds)} seeds: {len(layer_sets)} choices"
        run.reporter.message(f"compare-selection  {said}")
        students = _Students(run, mixers, directory).all(layer_sets)
        teacher = _teacher(run, directory)
    run_of = read_json(directory / "run.json")
    first(
        lambda: write_selection(
            directory,
            selection_table(
                choices,
                sorted(students, key=lambda student: student["layers"]),
                teacher,
                settings=_settings(run),
                methods=config.methods,
                num_layers=run.teacher.config.num_layers,
                train_length=run.config.distill.seq_len,
                run=run_of,
            ),
        )
    )
    page = directory / "index.html"
    run.reporter.message(f"the comparison is {page}")
    return page


def stage_of(run: Run) -> StageConfig:
    """The equal distillation: stage 2 as the config has it, cut short."""
    given, settings = run.config.distill, run.config.compare
    return dataclasses.replace(
        given,
        steps=settings.steps,
        batch_size=settings.batch_size or given.batch_size,
        warmup_steps=min(given.warmup_steps, settings.steps // 5),
        keep=1,
    )


def evaluation_of(run: Run) -> EvaluateConfig:
    """What every student is asked: `evaluate` with the comparison's own tasks, whole rows, and no samples of text."""
    given, settings = run.config.evaluate, run.config.compare
    lengths = settings.lengths or given.lengths
    return dataclasses.replace(
        given,
        tasks=settings.tasks or given.tasks,
        lengths=lengths,
        samples=settings.samples or given.samples,
        perplexity_length=settings.perplexity_length or given.perplexity_length,
        answer="forced",
        prefill_chunk=max(lengths, default=given.prefill_chunk),
        prompts=(),
    )


def _check(run: Run) -> None:
    """Raise HypenetError for what could not be done later on: rows, keeps, texts, needles."""
    config, num_layers = run.config, run.teacher.config.num_layers
    with precheck.section("compare"):
        check_rows(stage_of(run), run.mesh)
        for method in config.compare.methods:
            if method not in select.NEEDS:
                select.choose({}, num_layers, method, config.select.keep)
    if "gate-search" in config.compare.methods:
        precheck.check_gate(config, run.mesh)
    evaluation = evaluation_of(run)
    seed = evaluation.needle_seed(config.seed)
    precheck.check_evaluation(evaluation, run.tokenizer, run.heldout, seed, "compare")


def _settings(run: Run) -> dict[str, Any]:
    """What makes cells of a comparison comparable; more methods and seeds may join."""
    settings = {
        "select": dataclasses.asdict(run.config.select),
        "distill": dataclasses.asdict(stage_of(run)),
        "evaluate": dataclasses.asdict(evaluation_of(run)),
    }
    return json.loads(json.dumps(settings))


def _claim(directory: pathlib.Path, settings: dict[str, Any]) -> None:
    path = directory / "settings.json"
    if path.is_file():
        unused = ("new_tokens", "batch_tokens", "scale_lengths", "scale_grid", "chat")
        free = (
            "select.method",
            *(f"distill.{field}" for field in FREE_FIELDS),
            *(f"evaluate.{field}" for field in unused),
        )
        changed = differences(read_json(path), settings, free)
        if changed:
            raise HypenetError(f"{directory} holds a comparison of other settings: {changed[0]}; move it away")
        return
    write_json(path, settings)


def _choices(run: Run, mixers: dict, directory: pathlib.Path) -> list[dict[str, Any]]:
    """{"method", "seed", "layers", "tokens", "seconds"} of every method and seed."""
    config, num_layers = run.config, run.teacher.config.num_layers
    search = GateSearch(run, mixers)
    found = []
    for seed in config.compare.seeds:
        for method in config.compare.methods:
            needs = select.NEEDS.get(method, ())
            scores: dict[str, Any] = {}
            if method == "gate-search":
                scores = _searched(run, search, seed, directory)
            elif needs:
                scores = _probed(run, mixers, seed, directory)
            layers = select.choose(scores, num_layers, method, config.select.keep)
            costs = [scores["costs"][name] for name in needs]
            cell = {"method": method, "seed": seed, "layers": list(layers)}
            cell |= {name: sum(cost[name] for cost in costs) for name in ("tokens", "seconds")}
            if needs:
                cell["scores"] = select.importance_of(scores, method).tolist()
            found.append(cell)
    return found


def _probed(run: Run, mixers: dict, seed: int, directory: pathlib.Path) -> dict[str, Any]:
    """All scores of the probes that a seed draws, and what each cost."""
    path = directory / f"probes-seed{seed}.json"
    restored = "kl-ls-restored" in run.config.compare.methods
    if not path.is_file():
        run.reporter.message(f"compare-selection  probes of seed {seed}")
        costs: dict = {}
        with timed(directory, f"probes, seed {seed}"):
            scores = pipeline.measured(run, mixers, seed, restored=restored, costs=costs)
        write_json(path, scores | {"costs": costs})
    scores = read_json(path)
    if restored and "restored_kl" not in scores:
        # A method that joined: the other probes are as they were.
        run.reporter.message(f"compare-selection  probes of seed {seed} for kl-ls-restored")
        with timed(directory, f"probes, seed {seed}"):
            scores["restored_kl"] = pipeline.restored_kl(run, mixers, seed, scores["costs"])
        write_json(path, scores)
    return scores


def _searched(run: Run, search: GateSearch, seed: int, directory: pathlib.Path) -> dict[str, Any]:
    path, training = directory / f"gates-seed{seed}.json", directory / f"gate-search-seed{seed}"
    if not path.is_file():
        with timed(directory, f"gate search, seed {seed}"):
            found = search.search(seed, training)
        cost = {name: found.pop(name) for name in ("tokens", "seconds")}
        write_json(path, found | {"costs": {"gate": cost}})
        _drop_checkpoints(training)
    return read_json(path)


def _teacher(run: Run, directory: pathlib.Path) -> dict[str, Any]:
    path = directory / "teacher.json"
    if not path.is_file():
        with timed(directory, "evaluate teacher"):
            write_json(path, _evaluated(run, run.teacher, run.teacher_params, "teacher"))
    return read_json(path)


def _evaluated(run: Run, model: Any, params: dict, name: str) -> dict[str, Any]:
    settings = evaluation_of(run)
    windows, essays = corpus.measured_text(settings, run.heldout, run.tokenizer)
    return suite.evaluate_model(
        model,
        params,
        run.tokenizer,
        settings,
        windows=windows,
        essays=essays,
        seed=settings.needle_seed(run.config.seed),
        report=lambda line: run.reporter.message(f"compare-selection  {name}  {line}"),
        keep=lambda _: stop_if_asked(run.reporter.message, f"compare-selection  {name}"),
    )


def _drop_checkpoints(directory: pathlib.Path) -> None:
    """Free the disk of a training whose result is kept elsewhere."""
    first(lambda: shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True))


class _Students:
    """Distils and evaluates the student of a choice of layers; all of them share every compiled program."""

    def __init__(self, run: Run, mixers: dict, directory: pathlib.Path):
        self._run, self._mixers, self._directory = run, mixers, directory / "students"
        self._num_layers = run.teacher.config.num_layers

    def all(self, layer_sets: list[tuple[int, ...]]) -> list[dict[str, Any]]:
        """{"layers", "tokens", "seconds", "kl", "perplexity", "niah"} of every choice."""
        paths = {layers: self._directory / f"{_name(layers)}.json" for layers in layer_sets}
        if not all(path.is_file() for path in paths.values()):
            self._prepare()
        for layers, path in paths.items():
            if not path.is_file():
                write_json(path, self._one(layers))
                _drop_checkpoints(self._directory / _name(layers))
        return [read_json(path) for path in paths.values()]

    def _prepare(self) -> None:
        run, every = self._run, range(self._num_layers)
        student, attention = transferred(run, every)
        rnn, lightning = transferred(run, ())
        aligned = with_mixers(lightning, self._mixers)
        self._model = EitherModel(rnn)
        self._params = either_tree(attention, aligned, self._num_layers)
        axes = either_tree(student.param_axes(), rnn.param_axes(), self._num_layers)
        self._shardings = param_shardings(axes, self._params, run.mesh, rules_of(run.config.rules))
        self._stage = stage_of(run)
        self._loss = either_loss(run.teacher, self._model, self._stage.token_chunk)
        abstract = abstract_state(self._params, self._stage, self._shardings, run.mesh)
        self._update, self._frozen = make_step(self._loss, self._stage, abstract, run.mesh), run.frozen

    def _one(self, layers: tuple[int, ...]) -> dict[str, Any]:
        run, name = self._run, _name(layers)
        flags_L = np.isin(np.arange(self._num_layers), layers)
        start = corpus.stage_start(run.config, "distill")
        joined, workers = run.config.data.documents == "joined", run.config.data.workers
        batches = corpus.stage_batches(run.text, self._stage, start, run.config.seed, workers, run.mesh, joined=joined)
        with timed(self._directory.parent, f"student {name}"):
            trained, summary = train(
                name=f"student {name}",
                loss_fn=self._loss,
                params=self._params,
                frozen={"teacher": self._frozen, "attention_L": flags_L},
                batches=batches,
                stage=self._stage,
                directory=self._directory / name,
                mesh=run.mesh,
                param_shardings=self._shardings,
                model_info=config_to_dict(run.teacher.config) | {"attention_layers": list(layers)},
                reporter=run.reporter,
                update=self._update,
            )
            params = {"weights": trained, "attention_L": jax.numpy.asarray(flags_L)}
            measured = _evaluated(run, self._model, params, f"attention in {name}")
        keys = ("tokens", "seconds")
        return {"layers": list(layers), "kl": summary["loss"]} | {key: summary[key] for key in keys} | measured


def _name(layers: tuple[int, ...]) -> str:
    return "-".join(map(str, layers)) or "none"
