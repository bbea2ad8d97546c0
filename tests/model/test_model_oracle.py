"""Logits and gradients of whole networks against the float64 oracle, for every switch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import model_oracle
import numpy as np
import pytest

from hypenet_jax.model import LanguageModel, LogitsScaling
from hypenet_jax.model.config import POSITIONS

T = 11
HYPE = LogitsScaling("hype", 4.0)

VARIANTS = {
    "attention only, a qwen3 teacher": ("aa", {}, {"attention_rope": True, "attention_gate": False}),
    "attention only, no qk norm, untied": ("a", {}, {"qk_norm": False, "tie_embeddings": False}),
    "lightning only": ("ll", {}, {}),
    "hybrid, hype scaling": ("lal", {}, {"logits_scaling": HYPE}),
    "hybrid, constant scaling": ("la", {}, {"logits_scaling": LogitsScaling("constant", 1.5)}),
    "grouped heads in lightning": ("l", {"num_heads": 6, "num_kv_heads": 2}, {}),
    "four lightning heads": ("l", {"num_heads": 4, "num_kv_heads": 4}, {}),
    "bare lightning": ("l", {"qk_norm": False, "output_norm": False, "output_gate": False, "scale": "1/d"}, {}),
    "unscaled lightning with gate": ("l", {"output_norm": False, "scale": "none"}, {}),
} | {
    f"positions {name}": ("la", {"rope": rnn}, {"attention_rope": attention, "logits_scaling": HYPE})
    for name, (attention, rnn) in POSITIONS.items()
}


def _as_float64(params: dict) -> dict:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_logits(tiny_config, random_params, variant):
    mixers, lightning, overrides = variant
    model = LanguageModel(tiny_config(mixers, lightning, **overrides))
    params = random_params(model)
    tokens_BT = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, T))
    logits_BTV = model.logits(params, tokens_BT)
    assert logits_BTV.dtype == jnp.float32
    expected = np.stack([model_oracle.logits(_as_float64(params), model.config, tokens) for tokens in tokens_BT])
    np.testing.assert_allclose(logits_BTV, expected, rtol=1e-5, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("remat", [False, True])
def test_gradient_of_every_parameter(tiny_config, random_params, remat):
    """Along a random direction of each parameter, against float64 central differences, over two packed documents."""
    config = tiny_config("lal", {"num_heads": 6, "num_kv_heads": 3}, logits_scaling=HYPE, tie_embeddings=False)
    model = LanguageModel(config, remat=remat)
    params, rng = random_params(model), np.random.default_rng(2)
    tokens = rng.integers(0, config.vocab_size, 16)
    ids = np.array([-1, 4, 4, 4, 4, 4, 4, 9, 9, 9, 9, 9, 9, 9, -1, -1])
    weight_TV = rng.standard_normal((16, config.vocab_size)) * (ids >= 0)[:, None]
    documents = [np.flatnonzero(ids == 4), np.flatnonzero(ids == 9)]

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(model.logits(params, tokens[None], ids[None])[0] * weight_TV.astype(np.float32))

    def loss(params: dict) -> float:
        return sum(np.sum(model_oracle.logits(params, config, tokens[span]) * weight_TV[span]) for span in documents)

    leaves, structure = jax.tree.flatten(_as_float64(params))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for index, got in enumerate(jax.tree.leaves(gradient(params))):
        direction = rng.standard_normal(leaves[index].shape)
        values = []
        for step in (1e-5, -1e-5):
            moved = leaves[:index] + [leaves[index] + step * direction] + leaves[index + 1 :]
            values.append(loss(jax.tree.unflatten(structure, moved)))
        expected = (values[0] - values[1]) / 2e-5
        # The terms of the inner product are rounded to float32, so the error scales with their norm.
        bound = 2e-5 * np.linalg.norm(got) * np.linalg.norm(direction)
        assert abs(np.sum(got * direction) - expected) <= bound, paths[index]


def test_bfloat16_compute_stays_near(tiny_config, random_params):
    model = LanguageModel(tiny_config("lal", logits_scaling=HYPE))
    params = random_params(model)
    tokens_BT = np.random.default_rng(3).integers(0, model.config.vocab_size, (2, T))
    exact = np.asarray(model.logits(params, tokens_BT))
    rough = LanguageModel(model.config, "bfloat16").logits(params, tokens_BT)
    assert rough.dtype == jnp.float32
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.05, error
