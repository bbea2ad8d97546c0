"""Tiny models with parameters of a size at which every part of the network matters."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest

from hypenet_jax.model import LanguageModel, LightningConfig, ModelConfig


def _tiny_config(mixers: str = "lal", lightning: dict | None = None, **overrides) -> ModelConfig:
    """`mixers` is one letter a layer: a(ttention) or l(ightning)."""
    names = tuple({"a": "attention", "l": "lightning"}[letter] for letter in mixers)
    sizes = {"num_heads": 3, "num_kv_heads": 3, "head_dim": 8} | (lightning or {})
    fields = {
        "vocab_size": 31,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": len(names),
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "mixers": names,
        "family": "hypenet",
        "lightning": LightningConfig(**sizes) if "l" in mixers else None,
        "rope_theta": 1e4,
        "attention_rope": False,
        "attention_gate": True,
    }
    return ModelConfig(**(fields | overrides))


def _random_params(model: LanguageModel, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape, np.float32)
        return 1 + 0.3 * noise if len(leaf.shape) == 1 else 0.3 * noise

    return jax.tree.map(draw, model.param_shapes())


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    return _tiny_config


@pytest.fixture(scope="session")
def random_params() -> Callable[..., dict]:
    return _random_params
