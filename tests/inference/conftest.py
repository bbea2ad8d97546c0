"""A tiny hybrid model whose next tokens depend on everything before them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from hypenet_jax.model import LanguageModel, LightningConfig, LogitsScaling, ModelConfig


@pytest.fixture(scope="session")
def hybrid() -> tuple[LanguageModel, dict]:
    config = ModelConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mixers=("lightning", "attention", "lightning"),
        family="hypenet",
        attention_rope=False,
        attention_gate=True,
        logits_scaling=LogitsScaling("hype", 8.0),
        lightning=LightningConfig(num_heads=3, num_kv_heads=3, head_dim=8),
        eos_ids=(7,),
    )
    model, rng = LanguageModel(config), np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape, np.float32)
        return 1 + 0.3 * noise if len(leaf.shape) == 1 else 0.3 * noise

    return model, jax.tree.map(draw, model.param_shapes())
