"""What a stage runs, as a jitted function and its arguments without a single weight: shapes, types and shardings."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hypenet_jax import hub
from hypenet_jax.errors import HypenetError
from hypenet_jax.halo import select, transfer
from hypenet_jax.halo.align import alignment_loss, mixers_of
from hypenet_jax.halo.distill import distillation_loss
from hypenet_jax.halo.finetune import next_token_loss
from hypenet_jax.halo.precheck import section
from hypenet_jax.halo.pretrain import network
from hypenet_jax.halo.settings import ConvertConfig, PretrainConfig
from hypenet_jax.model import LanguageModel, ModelConfig
from hypenet_jax.parallel.mesh import row_axes
from hypenet_jax.parallel.rules import (
    Rules,
    batch_sharding,
    param_shardings,
    partition_spec,
    replicated,
    rules_of,
)
from hypenet_jax.plan.flops import cached_flops, training_flops
from hypenet_jax.train.loop import check_rows
from hypenet_jax.train.stage import StageConfig
from hypenet_jax.train.step import abstract_state, make_step

TRAINING = ("align", "distill", "finetune")
SCRATCH = ("train",)
INFERENCE = ("prefill", "decode")
STAGES = (*TRAINING, *SCRATCH, *INFERENCE)
# Tokens of a prompt that one step reads, as `inference.prefill` does by default.
PREFILL_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Work:
    """One compiled step's function and arguments, and what it does.

    parts: name -> tree of abstract arrays that lie in memory while it runs. flops: of all devices together. tokens:
    that a step works through. steps: of the whole stage (0: not a stage of training).
    """

    name: str
    step: Any  # a jitted function
    arguments: tuple[Any, ...]
    parts: dict[str, Any]
    flops: float
    tokens: int
    steps: int


def stages_of(config: ConvertConfig | PretrainConfig) -> tuple[str, ...]:
    """The stages that can be planned for a config, in the order in which it runs them."""
    return (SCRATCH if isinstance(config, PretrainConfig) else TRAINING) + INFERENCE


def models(config: ConvertConfig, teacher: ModelConfig) -> tuple[LanguageModel, LanguageModel]:
    """(teacher, student) with the config's dtype; layers that are not chosen yet are taken evenly spaced."""
    layers = config.student.attention_layers
    if layers is None:
        layers = tuple(select.choose({}, teacher.num_layers, "evenly", config.select.keep))
    student = transfer.student_of(teacher, layers, config.student.position, config.student.qk_norm)
    model = functools.partial(LanguageModel, dtype=config.dtype, remat=config.remat, exchange=config.exchange)
    return model(teacher), model(student)


def trained_student(name: str, config: ConvertConfig, teacher: ModelConfig) -> LanguageModel:
    """The student that a stage of training trains: in stage 1 every layer is Lightning."""
    return models(_all_lightning(config) if name == "align" else config, teacher)[1]


def scratch_model(config: PretrainConfig) -> LanguageModel:
    """The model that `hypenet pretrain` trains from scratch, its tokenizer read for the size of its vocabulary."""
    tokenizer = hub.tokenizer_of(config.tokenizer)
    return LanguageModel(network(config.model, tokenizer), config.dtype, config.remat, exchange=config.exchange)


def work_of(stage: str, config: ConvertConfig | PretrainConfig, teacher: ModelConfig | None, mesh: Mesh) -> Work:
    """What one step of a stage runs on a mesh, exactly as `hypenet convert` or `hypenet pretrain` would.

    `teacher`: of a conversion; training from scratch has none.

    Raises:
      HypenetError: a stage that the config does not have, or rows, positions, heads or widths that do not divide over
        the mesh.
    """
    if stage not in stages_of(config):
        kind = "training from scratch" if isinstance(config, PretrainConfig) else "a conversion"
        raise HypenetError(f"{kind} has no stage {stage!r}; its stages are {', '.join(stages_of(config))}")
    if isinstance(config, PretrainConfig):
        if stage in SCRATCH:
            return _from_scratch(config, mesh)
        return _inference(stage, scratch_model(config), config, config.train, mesh)
    assert teacher is not None
    if stage in TRAINING:
        return _training(stage, config, teacher, mesh)
    student = models(config, teacher)[1].with_logits_scaling(500.0)
    return _inference(stage, student, config, config.finetune, mesh)


def _training(name: str, config: ConvertConfig, teacher_config: ModelConfig, mesh: Mesh) -> Work:
    stage: StageConfig = getattr(config, name)
    check_rows(stage, mesh)
    teacher, student = models(config, teacher_config)[0], trained_student(name, config, teacher_config)
    axes, shapes = student.param_axes(), student.param_shapes()
    if name == "align":
        axes, shapes = (mixers_of(t, student.config.num_layers) for t in (student.param_axes(), student.param_shapes()))
        loss = alignment_loss(teacher, student)
    elif name == "distill":
        loss = distillation_loss(teacher, student, stage.token_chunk, dataclasses.asdict(config.objective))
    else:
        loss = next_token_loss(student, stage.token_chunk)
    with section("rules"):
        shardings = param_shardings(axes, shapes, mesh, rules_of(config.rules))
    with section("teacher_rules"):
        frozen = None if name == "finetune" else _weights(teacher, mesh, rules_of(config.teacher_rules))
    flops = training_flops(name, teacher_config, student.config, stage.seq_len, config.remat)
    return _step(name, loss, stage, abstract_state(shapes, stage, shardings, mesh), frozen, flops, mesh)


def _from_scratch(config: PretrainConfig, mesh: Mesh) -> Work:
    check_rows(config.train, mesh)
    model = scratch_model(config).with_logits_scaling(None)
    shapes = model.param_shapes()
    with section("rules"):
        shardings = param_shardings(model.param_axes(), shapes, mesh, rules_of(config.rules))
    loss = next_token_loss(model, config.train.token_chunk)
    flops = training_flops("finetune", model.config, model.config, config.train.seq_len, config.remat)
    return _step("train", loss, config.train, abstract_state(shapes, config.train, shardings, mesh), None, flops, mesh)


def _step(name: str, loss: Any, stage: StageConfig, state: Any, frozen: Any, flops: float, mesh: Mesh) -> Work:
    """A step of training; `flops` are of one token."""
    batch = _batch(stage.batch_size, stage.seq_len, mesh)
    parts = {"parameters": state["params"], "optimizer": state["opt_state"], "teacher": frozen, "batch": batch}
    tokens = stage.tokens_per_step
    step = make_step(loss, stage, state, mesh)
    return Work(name, step, (state, frozen, batch), parts, flops * tokens, tokens, stage.steps)


def _inference(
    name: str, model: LanguageModel, config: ConvertConfig | PretrainConfig, last: StageConfig, mesh: Mesh
) -> Work:
    """A step onto a cache as long as the longest needle test, or the rows of the last stage of training; one row for
    each group of devices that shares rows."""
    rows = math.prod(mesh.shape[axis] for axis in row_axes(mesh))
    shards = mesh.shape["seq"]
    length = -(-max((*config.evaluate.lengths, last.seq_len)) // shards) * shards
    width = min(PREFILL_CHUNK, length) if name == "prefill" else 1
    with section("rules"):
        weights = _weights(model, mesh, rules_of(config.rules))
    cache = _cache(model, rows, length, mesh)
    tokens = jax.ShapeDtypeStruct((rows, width), jnp.int32, sharding=batch_sharding(mesh) if width > 1 else None)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, cache)

    def step(params, tokens_BT, cache):
        hidden_BTD, cache = model.step(params, tokens_BT, cache)
        return jnp.argmax(model.project(params, hidden_BTD[:, -1]), axis=-1), cache

    jitted = jax.jit(step, donate_argnums=2, out_shardings=(replicated(mesh), shardings))
    flops = cached_flops(model.config, width, length - width) * rows * width
    parts = {"parameters": weights, "cache": cache}
    return Work(name, jitted, (weights, tokens, cache), parts, flops, rows * width, 0)


def _all_lightning(config: ConvertConfig) -> ConvertConfig:
    return dataclasses.replace(config, student=dataclasses.replace(config.student, attention_layers=()))


def _weights(model: LanguageModel, mesh: Mesh, rules: Rules) -> Any:
    """Frozen weights in the compute dtype, divided as the rules say."""
    shapes = model.param_shapes()
    shardings = param_shardings(model.param_axes(), shapes, mesh, rules)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, model.dtype, sharding=s), shapes, shardings)


def _batch(rows: int, length: int, mesh: Mesh) -> dict[str, Any]:
    """The arrays of `data.batches`."""
    types = {"tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "loss_mask": jnp.bool_}
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct((rows, length), kind, sharding=sharding) for name, kind in types.items()}


def _cache(model: LanguageModel, rows: int, length: int, mesh: Mesh) -> Any:
    """A cache: rows over the axes of rows, slots over seq, heads over tensor where they divide."""
    shapes = jax.eval_shape(lambda: model.init_cache(rows, length))
    axes = {"length": ("batch",), "k": ("batch", "length", "act_kv_heads", None), "state": ("batch", "act_heads")}
    axes["v"] = axes["k"]

    def place(path: Any, leaf: Any) -> Any:
        names = axes[jax.tree_util.keystr(path[-1:], simple=True)]
        names = names + (None,) * (len(leaf.shape) - len(names))
        spec = partition_spec(
            [n if n != "act_kv_heads" or leaf.shape[2] % mesh.shape["tensor"] == 0 else None for n in names], mesh
        )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, shapes)
