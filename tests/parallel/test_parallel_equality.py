"""Whatever the mesh, losses, gradients and generated tokens are those of one device, and kernels see their own part."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from process_runs import codes, said, started

import hypenet_jax as hn
from hypenet_jax.evals.token_nll import token_nll
from hypenet_jax.halo.align import alignment_loss, mixers_of
from hypenet_jax.halo.distill import distillation_loss
from hypenet_jax.halo.finetune import next_token_loss
from hypenet_jax.halo.fit_scale import fit_scale
from hypenet_jax.model.config import LightningConfig
from hypenet_jax.parallel import activations, sharded_kernels
from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.parallel.rules import batch_sharding, changed_rules, param_shardings
from hypenet_jax.train.step import loss_and_gradients
from kernels_pallas import compat, lightning

HERE = pathlib.Path(__file__).resolve().parent
SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_layers": 2, "num_heads": 8, "head_dim": 4,
    "rope_theta": 1e4, "max_position": 64, "eos_ids": (0,), "pad_id": 0, "tie_embeddings": False,
}  # fmt: skip
LIGHTNING = LightningConfig(num_heads=8, num_kv_heads=8, head_dim=4)
TEACHER = hn.LanguageModel(hn.ModelConfig(num_kv_heads=2, mixers=("attention", "attention"), **SIZES))
NOPE = {"num_kv_heads": 2, "attention_rope": False, "attention_gate": True, "lightning": LIGHTNING, **SIZES}
STUDENT = hn.LanguageModel(hn.ModelConfig(mixers=("attention", "lightning"), **NOPE)).with_logits_scaling(50.0)
ALIGNED = hn.LanguageModel(hn.ModelConfig(mixers=("lightning", "lightning"), **NOPE))
STAGES = ("align", "distill", "finetune")
EVERY_MESH = [
    {name: size for name, size in zip(("dcn", "data", "fsdp", "seq", "tensor"), sizes, strict=True) if size > 1}
    for sizes in itertools.product((1, 2, 4, 8), repeat=5)
    if np.prod(sizes) == 8
]
CASES = [
    ("align", {"fsdp": 2, "tensor": 4}),
    ("finetune", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("distill", {"data": 2, "fsdp": 4}),
    ("distill", {"tensor": 8}),
    ("distill", {"dcn": 2, "fsdp": 2, "tensor": 2}),
    ("align", {"seq": 8}),
    ("finetune", {"dcn": 2, "seq": 4}),
    ("distill", {"fsdp": 2, "seq": 2, "tensor": 2}),
]
# HYPENET_EVERY_MESH=1: all of them, in 10 minutes on two cores.
if os.environ.get("HYPENET_EVERY_MESH"):
    CASES = list(itertools.product(STAGES, EVERY_MESH))


def names(mesh):
    return "-".join(f"{name}{size}" for name, size in mesh.items())


def draw(model, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape, np.float32), model.param_shapes())


@functools.cache
def batch():
    """Documents that start anywhere, padding at the ends, a row of nothing but padding."""
    rng = np.random.default_rng(5)
    segments = np.cumsum(rng.random((16, 16)) < 0.2, axis=1).astype(np.int32)
    segments[::2, 13:], segments[5, :4], segments[3] = -1, -1, -1
    tokens, targets = rng.integers(0, 64, (2, 16, 16)).astype(np.int32)
    return {"tokens": tokens, "targets": targets, "segment_ids": segments, "loss_mask": segments >= 0}


def stage(name, **options):
    """(loss, parameters, their axes, frozen) of a stage of HALO; options of its models."""
    teacher, student, aligned = (dataclasses.replace(model, **options) for model in (TEACHER, STUDENT, ALIGNED))
    if name == "align":
        params, axes = (mixers_of(tree, 2) for tree in (draw(ALIGNED, 1), ALIGNED.param_axes()))
        return alignment_loss(teacher, aligned), params, axes, draw(TEACHER, 0)
    loss = distillation_loss(teacher, student, 16) if name == "distill" else next_token_loss(student, 16)
    return loss, draw(STUDENT, 2), STUDENT.param_axes(), draw(TEACHER, 0)


@functools.cache
def on_one_device(name):
    loss, params, _, frozen = stage(name)
    return jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params, frozen, batch()))


def check(name, axes, microbatches=1, **options):
    mesh = make_mesh(axes)
    loss, params, param_axes, frozen = stage(name, **options)
    teacher_rules = changed_rules(embed=())  # the teacher whole over fsdp, the student divided
    params = jax.device_put(params, param_shardings(param_axes, params, mesh))
    frozen = jax.device_put(frozen, param_shardings(TEACHER.param_axes(), frozen, mesh, teacher_rules))
    placed = jax.device_put(batch(), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        step = jax.jit(functools.partial(loss_and_gradients, loss, microbatches=microbatches, mesh=mesh))
        got, metrics, gradients = step(params, frozen, placed)
    (wanted, wanted_metrics), wanted_gradients = on_one_device(name)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert metrics["count"] == wanted_metrics["count"]
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(wanted_gradients), strict=True
    ):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-12, jax.tree_util.keystr(path)


@pytest.mark.parametrize(("name", "axes"), CASES, ids=lambda case: case if isinstance(case, str) else names(case))
def test_loss_and_gradients_are_those_of_one_device(name, axes):
    check(name, axes)


@settings(max_examples=6)
@given(
    name=st.sampled_from(STAGES),
    axes=st.sampled_from(EVERY_MESH),
    microbatches=st.sampled_from([1, 2]),
    remat=st.booleans(),
    exchange=st.sampled_from(["ring", "gather"]),
)
def test_on_any_mesh_too(name, axes, microbatches, remat, exchange):
    check(name, axes, microbatches, remat=remat, exchange=exchange)


def measured(params):
    """Losses token by token and with each scale, of 21 tokens, which no number of devices divides."""
    windows = np.random.default_rng(7).integers(0, 64, (3, 22)).astype(np.int32)
    ids = np.repeat([[0] * 8 + [1] * 13], 3, axis=0).astype(np.int32)
    fitted = fit_scale(STUDENT, params, windows, [20.0, 50.0, 100.0], batch_size=2)
    return token_nll(STUDENT, params, windows[:, :-1], windows[:, 1:], ids, token_chunk=12), fitted["loss"]


@pytest.mark.parametrize("axes", [{"data": 2, "seq": 2, "tensor": 2}, {"seq": 8}], ids=names)
def test_the_loss_of_every_token_and_the_fitted_scale_are_those_of_one_device(axes):
    params, mesh = draw(STUDENT, 2), make_mesh(axes)
    (nll, right), fitted = measured(params)
    params = jax.device_put(params, param_shardings(STUDENT.param_axes(), params, mesh))
    with jax.set_mesh(mesh):
        (got, got_right), got_fitted = measured(params)
    np.testing.assert_allclose(got, nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got_right, right)
    np.testing.assert_allclose(got_fitted, fitted, rtol=1e-6)


def generated(params):
    """Of prompts of several chunks; under seq the wide ones are split, the narrow ones and the steps are not."""
    prompts, options = [list(range(1, 42)), [7], [1, 2, 9]], {"stop_ids": [], "prefill_chunk": 32}
    return hn.generate(STUDENT, params, prompts, max_new_tokens=6, **options)


@pytest.mark.parametrize(
    "axes", [{"fsdp": 2, "tensor": 4}, {"tensor": 8}, {"seq": 8}, {"data": 2, "seq": 2, "tensor": 2}], ids=names
)
def test_generation_gives_the_tokens_of_one_device(axes):
    mesh, params = make_mesh(axes), draw(STUDENT, 2)
    spread = jax.device_put(params, param_shardings(STUDENT.param_axes(), params, mesh))
    assert generated(spread) == generated(params)  # the mesh is the parameters'


@pytest.mark.parametrize(
    ("axes", "what"),
    [({"seq": 2}, ("distill", "generated", "measured")), ({"fsdp": 2, "seq": 2}, ("align", "finetune"))],
    ids=["seq2", "fsdp2-seq2"],
)
def test_positions_may_be_split_between_processes(axes, what, tmp_path):
    """Training, generation, evaluation; each process has a part of every row."""
    command = [str(HERE / "seq_over_processes.py"), json.dumps(axes), str(tmp_path / "found"), *what]
    with started(command, 2, tmp_path / "logs", devices=len(axes), paths=[HERE]) as running:
        assert codes(running, 600) == [0, 0], said(tmp_path / "logs")
    got, wanted, params = np.load(tmp_path / "found.npz"), {}, draw(STUDENT, 2)
    for name in what:
        if name in STAGES:
            (loss, metrics), gradients = on_one_device(name)
            wanted[name] = loss, metrics["count"], gradients
        else:
            wanted[name] = {"generated": generated, "measured": measured}[name](params)
    leaves = jax.tree_util.tree_leaves_with_path(wanted)
    assert len(leaves) == len(got.files)
    for path, array in leaves:
        name = jax.tree_util.keystr(path)
        found, array = got[name].astype(np.float64), np.asarray(array, np.float64)
        assert found.shape == array.shape
        assert np.linalg.norm(found - array) <= 1e-5 * np.linalg.norm(array) + 1e-12, name


def test_no_device_holds_the_whole_cache():
    """Of a prompt's chunk and of a decoded token: a shard has its share of the slots, and none are gathered."""
    with jax.set_mesh(make_mesh({"data": 2, "seq": 4})):
        cache = jax.jit(STUDENT.init_cache, static_argnums=(0, 1))(2, 1022)
        assert cache["layers"][0]["k"].shape == (2, 1024, 2, 4)
        assert {shard.data.shape for shard in cache["layers"][0]["k"].addressable_shards} == {(1, 256, 2, 4)}
        for tokens in (8, 1):
            text = (
                jax.jit(STUDENT.step).lower(draw(STUDENT, 2), np.ones((2, tokens), np.int32), cache).compile().as_text()
            )
            assert "256,2,4" in text and "1024,2,4" not in text


def test_each_device_calls_the_kernels_with_its_own_rows_and_heads(monkeypatch):
    seen = {}

    def watch(module, name, argument):
        kernel = getattr(module, name)

        def watched(*operands, **options):
            assert compat.undivided() is None
            assert activations.divided_mesh() is None
            seen[name] = options[argument].shape
            return kernel(*operands, **options)

        monkeypatch.setattr(module, name, watched)

    watch(sharded_kernels.attention_kernels, "attention", "k_BSKD")
    watch(sharded_kernels.attention_kernels, "cached_attention", "q_BTHD")
    watch(sharded_kernels.lightning_kernels, "lightning_attention", "q_BTHK")
    watch(sharded_kernels.losses, "linear_kl", "weight_student")
    loss, params, _, frozen = stage("distill")
    cache = STUDENT.init_cache(16, 16)
    with jax.set_mesh(make_mesh({"data": 2, "tensor": 4})):
        jax.eval_shape(loss, params, frozen, batch())
        jax.eval_shape(STUDENT.step, params, batch()["tokens"], cache)
    wanted = {"attention": (8, 16, 1, 4), "cached_attention": (8, 16, 2, 4), "lightning_attention": (8, 16, 2, 4)}
    assert seen == wanted | {"linear_kl": (16, 16)}


def test_without_a_mesh_the_kernel_is_called_as_it_is():
    q = jnp.ones((2, 4, 8, 4))

    def call(q):
        return sharded_kernels.lightning_attention(q, q, q, lightning.slopes(8))[0]

    assert "shard_map" not in str(jax.make_jaxpr(call)(q))
    with jax.set_mesh(make_mesh({"data": 2, "tensor": 4})):
        assert "shard_map" in str(jax.make_jaxpr(call)(q))
        with pytest.raises(hn.HypenetError, match="6 heads.*tensor=4"):
            sharded_kernels.attention(q[:, :, :6], q[:, :, :2], q[:, :, :2])
