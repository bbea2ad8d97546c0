"""The paper's from-scratch comparison: architectures that differ in nothing else, tested far beyond their training.

A work directory holds runs/<variant>-seed<k> (a training each), results/<variant>-seed<k>.json (what was measured with
it) and report/. Variants that differ in their scaling alone share the first one's training.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hypenet_jax import hub
from hypenet_jax.data.packing import PackedTokens
from hypenet_jax.data.tokenizers import Tokenizer
from hypenet_jax.evals import niah, perplexity, suite
from hypenet_jax.evals.comparison import is_of
from hypenet_jax.evals.niah_samples import NiahSample
from hypenet_jax.evals.report import write_report
from hypenet_jax.halo import corpus, workdir
from hypenet_jax.halo.compare_settings import ComparisonConfig, VariantConfig
from hypenet_jax.halo.fit_scale import fit_scale
from hypenet_jax.halo.precheck import section
from hypenet_jax.halo.pretrain import network
from hypenet_jax.halo.shared_program import choice, compiled_programs_kept, shared_program
from hypenet_jax.halo.workdir import DATA, claim, read_json, timed, write_json
from hypenet_jax.model import LanguageModel, LogitsScaling
from hypenet_jax.model.serialize import config_to_dict
from hypenet_jax.parallel.mesh import check_compute_dtype, make_mesh
from hypenet_jax.parallel.processes import first
from hypenet_jax.parallel.rules import param_shardings, rules_of
from hypenet_jax.train.checkpoint import read_latest
from hypenet_jax.train.loop import check_rows, check_same_run, train
from hypenet_jax.train.losses import lm_loss
from hypenet_jax.train.metrics import ReporterLike
from hypenet_jax.train.preemption import stop_if_asked

RUNS, RESULTS, COMPILED = "runs", "results", "compiled"
# Variants and seeds may join a comparison; results that were measured otherwise are measured again.
FREE = (*workdir.FREE, "variants", "seeds", "fit_scale", "row_lengths")


def compare(config: ComparisonConfig, directory: str | os.PathLike, reporter: ReporterLike) -> pathlib.Path:
    """Train and measure every variant with every seed, write the report and return its path.

    Resumable: a training goes on at its last checkpoint, and what is measured stays.
    """
    mesh = make_mesh(config.mesh or None)
    check_compute_dtype(config.dtype)
    tokenizer = hub.tokenizer_of(config.tokenizer)
    groups = trainings(config, tokenizer)
    check_rows(config.train, mesh)
    path = claim(directory, config, FREE, lasting=False)
    text, heldout = corpus.packed_corpus(config.data, tokenizer, path / DATA, reporter.message)
    missing = any(not _measured(_result(path, v, seed), v, config) for v in config.variants for seed in config.seeds)
    if missing:
        _check_begun(config, groups, path)
        with timed(path, "make needles"):
            material = _material(config, tokenizer, heldout)
    claim(directory, config, FREE)
    if missing:
        with compiled_programs_kept(path / COMPILED):
            _train_and_measure(config, groups, text, material, path, mesh, reporter)
    first(lambda: write_report(path))
    return path / "report" / "index.html"


def _check_begun(
    config: ComparisonConfig, groups: list[tuple[LanguageModel, list[VariantConfig]]], path: pathlib.Path
) -> None:
    """Raise HypenetError where a training that is to go on is of another network, as after a variant was changed."""
    for seed in config.seeds:
        for model, variants in groups:
            place = path / RUNS / f"{variants[0].name}-seed{seed}"
            needed = any(not _measured(_result(path, v, seed), v, config) for v in variants)
            saved = read_latest(place) if needed else None
            if saved is not None:
                check_same_run(saved, config.train, config_to_dict(model.config), str(place))


def _train_and_measure(
    config: ComparisonConfig,
    groups: list[tuple[LanguageModel, list[VariantConfig]]],
    text: PackedTokens,
    material: _Material,
    path: pathlib.Path,
    mesh: Mesh,
    reporter: ReporterLike,
) -> None:
    for seed in config.seeds:
        for model, variants in groups:
            missing = [v for v in variants if not _measured(_result(path, v, seed), v, config)]
            if not missing:
                continue
            name = f"{variants[0].name}-seed{seed}"
            params, summary = _trained(model, text, config, path, name, seed, mesh, reporter)
            for variant in missing:
                result = f"{variant.name}-seed{seed}"
                between = partial(stop_if_asked, reporter.message, f"evaluate {result}")
                with timed(path, f"evaluate {result}"):
                    found = measure(model, params, variant, config, material, between)
                write_json(_result(path, variant, seed), found | {"seed": seed, "training": summary})
                reporter.message(_line(variant, seed, found["niah"]))


def trainings(config: ComparisonConfig, tokenizer: Tokenizer) -> list[tuple[LanguageModel, list[VariantConfig]]]:
    """The networks to train, each with the variants it serves, in the order of the config."""
    groups: dict[LanguageModel, list[VariantConfig]] = defaultdict(list)
    for variant in config.variants:
        sizes = dataclasses.replace(
            config.model,
            attention_layers=config.model.attention_layers if variant.hybrid else None,
            position=variant.position,
            intermediate_size=variant.intermediate_size or config.model.intermediate_size,
        )
        groups[LanguageModel(network(sizes, tokenizer), config.dtype, config.remat, tokenizer)].append(variant)
    return list(groups.items())


def _trained(
    model: LanguageModel,
    text: PackedTokens,
    config: ComparisonConfig,
    path: pathlib.Path,
    name: str,
    seed: int,
    mesh: Mesh,
    reporter: ReporterLike,
) -> tuple[dict, dict[str, Any]]:
    """(parameters, summary) of a training; the rows and their order follow from the text and the seed alone."""
    shardings = param_shardings(model.param_axes(), model.param_shapes(), mesh, rules_of({}))
    program = shared_program(model, scaled=False)

    def loss(params: dict, frozen: dict, batch: dict):
        chosen = {"weights": params, "choice": frozen}
        hidden = program.hidden(chosen, batch["tokens"], batch["segment_ids"])
        return lm_loss(hidden, program.head(chosen), batch, token_chunk=config.train.token_chunk)

    with timed(path, f"train {name}"):
        return train(
            name=name,
            loss_fn=loss,
            params=jax.jit(model.init, out_shardings=shardings)(jax.random.key(seed)),
            frozen=choice(model.config),
            batches=corpus.stage_batches(
                text, config.train, 0, seed, config.data.workers, mesh, joined=config.data.documents == "joined"
            ),
            stage=config.train,
            directory=path / RUNS / name,
            mesh=mesh,
            param_shardings=shardings,
            model_info=config_to_dict(model.config),
            reporter=reporter,
            config=dataclasses.asdict(config),
        )


@dataclasses.dataclass(frozen=True)
class _Material:
    """What every variant is tested on: needles by the length of their rows, and held-out windows int32 [N, T+1]."""

    needles: dict[int, list[NiahSample]]
    windows: np.ndarray
    fit_windows: np.ndarray


def _material(config: ComparisonConfig, tokenizer: Tokenizer, heldout: PackedTokens) -> _Material:
    settings, fit = config.evaluate, config.fit_scale
    with section("evaluate"):
        windows, essays = corpus.measured_text(settings, heldout, tokenizer)
    with section("fit_scale"):
        fit_windows = corpus.long_documents(heldout, fit.length, fit.documents)
    needles: dict[int, list[NiahSample]] = defaultdict(list)
    for length in sorted(settings.lengths):
        row = min((row for row in config.row_lengths if row >= length), default=length)
        for task in settings.tasks:
            with section("evaluate"):
                needles[row] += suite.needle_samples(tokenizer, settings, task, length, essays, 0)
    return _Material(dict(needles), windows, fit_windows)


def measure(
    model: LanguageModel,
    params: dict,
    variant: VariantConfig,
    config: ComparisonConfig,
    material: _Material,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One variant's numbers, JSON-able: needles, loss by position, the scaling they were measured with.

    `between` is called before each a, the windows and each length of needles, where a run may be stopped.
    """
    fit = None
    if variant.scaling == "fit":
        wanted, windows = config.fit_scale, material.fit_windows
        fit = fit_scale(model, params, windows, wanted.grid, wanted.batch_size, between, wanted.tolerance)
        model = model.with_logits_scaling(fit["a"])
    elif variant.scaling == "constant":
        model = model.with_logits_scaling(LogitsScaling("constant", variant.constant))
    settings, program = config.evaluate, shared_program(model, scaled=True)
    chosen = {"weights": params, "choice": choice(model.config)}
    batch = max(1, settings.batch_tokens // settings.perplexity_length)
    between()
    losses = perplexity.window_loss(program, chosen, material.windows, min(batch, len(material.windows)))
    rows = []
    for length, samples in material.needles.items():
        between()
        batch = max(1, min(len(samples), settings.batch_tokens // length))
        found = niah.score_forced(
            program, chosen, samples, batch, alternatives=settings.alternatives, row_length=length
        )
        rows += found.rows
    return {
        "variant": dataclasses.asdict(variant),
        "settings": _settings(config),
        "network": config_to_dict(model.config),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "fit_scale": fit,
        "perplexity": losses.perplexity,
        "perplexity_by_position": losses.by_position(),
        "windows": len(material.windows),
        "niah": rows,
    }


def _settings(config: ComparisonConfig) -> dict[str, Any]:
    """What a result depends on beside its training and its variant."""
    return {"evaluate": dataclasses.asdict(config.evaluate), "fit_scale": dataclasses.asdict(config.fit_scale)}


def _result(path: pathlib.Path, variant: VariantConfig, seed: int) -> pathlib.Path:
    return path / RESULTS / f"{variant.name}-seed{seed}.json"


def _measured(file: pathlib.Path, variant: VariantConfig, config: ComparisonConfig) -> bool:
    """Whether the file holds this variant's result, measured as the config says."""
    if not file.is_file():
        return False
    wanted = json.loads(json.dumps({"variant": dataclasses.asdict(variant), "settings": _settings(config)}))
    return is_of(read_json(file), **wanted)


def _line(variant: VariantConfig, seed: int, rows: list[dict]) -> str:
    """What was found, in one line for the terminal."""
    counts: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        cell = counts[row["task"], row["length"]]
        cell[0] += row["correct"]
        cell[1] += row["total"]
    found = ", ".join(f"{task} {length}: {right}/{total}" for (task, length), (right, total) in counts.items())
    return f"{variant.name}, seed {seed}: {found}"
