"""Shapes, logical axes and the start of the parameters."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from hypenet_jax.model import LanguageModel


def _is_names(node: object) -> bool:
    return isinstance(node, tuple)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, tiny_config) -> LanguageModel:
    return LanguageModel(tiny_config("lal", tie_embeddings=request.param))


def test_init_shapes_and_axes_describe_one_tree(model):
    params, shapes, axes = jax.jit(model.init)(jax.random.key(0)), model.param_shapes(), model.param_axes()
    assert jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params) == shapes
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(shapes))
    assert jax.tree.structure(axes, is_leaf=_is_names) == jax.tree.structure(shapes)
    for names, leaf in zip(jax.tree.leaves(axes, is_leaf=_is_names), jax.tree.leaves(shapes), strict=True):
        assert len(names) == len(leaf.shape)
        assert all(name is None or isinstance(name, str) for name in names)


def test_layout_is_the_contract(model):
    shapes = jax.tree.map(lambda leaf: leaf.shape, model.param_shapes())
    config, lightning = model.config, model.config.lightning
    width, head_dim = config.hidden_size, config.head_dim
    wide, narrow = (config.num_heads, head_dim), (config.num_kv_heads, head_dim)
    assert set(shapes) - {"lm_head"} == {"embedding", "final_norm", "layer_0", "layer_1", "layer_2"}
    assert ("lm_head" in shapes) == (not config.tie_embeddings)
    assert shapes["layer_1"]["mixer"] == {
        "q": (width, *wide),
        "k": (width, *narrow),
        "v": (width, *narrow),
        "o": (*wide, width),
        "q_norm": (head_dim,),
        "k_norm": (head_dim,),
        "gate": (width, *wide),
    }
    heads = (lightning.num_heads, lightning.head_dim)
    assert shapes["layer_0"]["mixer"]["o_norm"] == heads
    assert shapes["layer_0"]["mixer"]["gate"] == (width, *heads)


def test_switches_remove_parameters(tiny_config):
    config = tiny_config(
        "la", {"qk_norm": False, "output_norm": False, "output_gate": False}, qk_norm=False, attention_gate=False
    )
    shapes = LanguageModel(config).param_shapes()
    assert set(shapes["layer_0"]["mixer"]) == set(shapes["layer_1"]["mixer"]) == {"q", "k", "v", "o"}


def test_init_depends_on_the_key_and_norms_start_at_one(model):
    init = jax.jit(model.init)
    first, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), first, again))
    assert (first["embedding"] != other["embedding"]).any()
    assert (first["layer_0"]["mixer"]["q"] != first["layer_2"]["mixer"]["q"]).any()
    assert (first["layer_0"]["mixer"]["o_norm"] == 1).all() and (first["final_norm"] == 1).all()


def test_head(model):
    params = jax.jit(model.init)(jax.random.key(0))
    expected = params["embedding"].T if model.config.tie_embeddings else params["lm_head"]
    np.testing.assert_array_equal(model.head(params), expected)
