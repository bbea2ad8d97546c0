"""Training from scratch with cross-entropy, by HALO's loop: teachers, and the paper's from-scratch comparison."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

import jax

from hypenet_jax import hub
from hypenet_jax.data.tokenizers import Tokenizer
from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.card import run_card
from hypenet_jax.evals.report import write_report
from hypenet_jax.halo import corpus
from hypenet_jax.halo.finetune import next_token_loss
from hypenet_jax.halo.measured import Evaluation, Measured, Questions
from hypenet_jax.halo.precheck import check_evaluation, section
from hypenet_jax.halo.settings import NetworkConfig, PretrainConfig
from hypenet_jax.halo.transfer import student_of
from hypenet_jax.halo.workdir import DATA, claim, timed
from hypenet_jax.hub.card import CARD, replace_card
from hypenet_jax.model import LanguageModel, ModelConfig
from hypenet_jax.model.serialize import config_to_dict
from hypenet_jax.parallel.mesh import check_compute_dtype, make_mesh
from hypenet_jax.parallel.processes import first, place
from hypenet_jax.parallel.rules import param_shardings, rules_of
from hypenet_jax.train.loop import check_rows, train
from hypenet_jax.train.metrics import ReporterLike
from hypenet_jax.train.preemption import stop_if_asked


def pretrain(
    config: PretrainConfig, workdir: str | os.PathLike, reporter: ReporterLike, command: str | None = None
) -> pathlib.Path:
    """Train, export to W/export, evaluate into W/eval.json, report. Returns the report's path.

    Resumable: the training goes on at its last checkpoint, the evaluation with the next of its cells.
    """
    mesh = make_mesh(config.mesh or None)
    check_compute_dtype(config.dtype)
    tokenizer = hub.tokenizer_of(config.tokenizer)
    model = LanguageModel(network(config.model, tokenizer), config.dtype, config.remat, tokenizer, config.exchange)
    trained = model.with_logits_scaling(None)
    check_rows(config.train, mesh)
    with section("rules"):
        shardings = param_shardings(model.param_axes(), model.param_shapes(), mesh, rules_of(config.rules))
    _check_start(model, config)
    path = claim(workdir, config)
    text, heldout = corpus.packed_corpus(config.data, tokenizer, path / DATA, reporter.message)
    check_evaluation(config.evaluate, tokenizer, heldout, config.evaluate.needle_seed(config.seed))
    with timed(path, "train"):
        params, _ = train(
            name="train",
            loss_fn=next_token_loss(trained, config.train.token_chunk),
            params=_start(model, config, shardings),
            frozen=None,
            batches=corpus.stage_batches(
                text, config.train, 0, config.seed, config.data.workers, mesh, joined=config.data.documents == "joined"
            ),
            stage=config.train,
            directory=path / "train",
            mesh=mesh,
            param_shardings=shardings,
            model_info=config_to_dict(trained.config),
            reporter=reporter,
            config=dataclasses.asdict(config),
        )
    stop_if_asked(reporter.message, "export")
    hub.save(model, params, path / "export", card=run_card(path, model.config, "float32", command))
    windows, essays = corpus.measured_text(config.evaluate, heldout, tokenizer)
    asked = Questions(config.evaluate, config.evaluate.needle_seed(config.seed), tokenizer, windows, essays)
    evaluation = Evaluation(path, asked, reporter.message, train_length=config.train.seq_len)
    evaluation.measure("model", Measured(model, params), "evaluate")
    first(lambda: _card_and_report(path, run_card(path, model.config, "float32", command), reporter))
    return path / "report" / "index.html"


def _card_and_report(path: pathlib.Path, card: str, reporter: ReporterLike) -> None:
    if not replace_card(path / "export", card):
        reporter.message(f"{path / 'export' / CARD} was edited and is left as it is")
    write_report(path)


def _check_start(model: LanguageModel, config: PretrainConfig) -> None:
    """Raise HypenetError where the model to start from is none, or another network."""
    if config.start_from is None:
        return
    other, _ = hub.check(config.start_from)
    # What is no part of training: a stage's checkpoint is without the scaling that its export has.
    apart: dict[str, Any] = {"bos_id": None, "eos_ids": (), "pad_id": None, "max_position": 0, "logits_scaling": None}
    if dataclasses.replace(model.config, **apart) != dataclasses.replace(other, **apart):
        raise HypenetError(f"start_from {config.start_from} is another network than `model`; give one of its sizes")


def _start(model: LanguageModel, config: PretrainConfig, shardings) -> dict:
    """Random parameters; or another model's, its matrices shrunk towards them by `start_share`.

    Shrinking and perturbing a model that has memorised its text lets it generalise again while it keeps most of the
    way it has come (Ash and Adams, arXiv 1910.08475).
    """
    fresh = jax.jit(model.init, out_shardings=shardings)(jax.random.key(config.seed))
    if config.start_from is None:
        return fresh
    params, share = jax.tree.map(place, hub.load(config.start_from)[1], shardings), config.start_share

    def blend(old, new):
        return share * old + (1 - share) * new if new.ndim > 1 else old

    return jax.jit(lambda old, new: jax.tree.map(blend, old, new), out_shardings=shardings)(params, fresh)


def network(sizes: NetworkConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's config: a Qwen3- or Llama-like Transformer, or a HypeNet when `attention_layers` is given."""
    every_layer = ("attention",) * sizes.num_layers
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        mixers=every_layer,
        family="qwen3" if sizes.qk_norm else "llama",
        tie_embeddings=sizes.tie_embeddings,
        qk_norm=sizes.qk_norm,
        rope_theta=sizes.rope_theta,
        max_position=sizes.max_position,
        bos_id=tokenizer.bos_id,
        eos_ids=(tokenizer.eos_id,),
        pad_id=tokenizer.pad_id,
    )
    if sizes.attention_layers is None:
        return config
    hybrid = student_of(config, sizes.attention_layers, sizes.position)
    scaled = LanguageModel(hybrid).with_logits_scaling(sizes.logits_scaling)
    return scaled.config
