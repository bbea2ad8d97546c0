"""The Lightning layer against the official code's outputs and states."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from hypenet_jax.model.config import LightningConfig, ModelConfig
from hypenet_jax.model.context import Context
from hypenet_jax.model.mixers import lightning

H, K = 4, 32


@pytest.fixture(scope="module")
def golden(shared) -> dict:
    return load_file(shared / "golden" / "c_lightning_layer.safetensors") | {
        "about": json.loads((shared / "golden" / "c_lightning_layer.json").read_text())
    }


@pytest.fixture(scope="module")
def layer(golden) -> tuple[ModelConfig, dict]:
    settings = golden["about"]["config"]
    config = ModelConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=settings["hidden_size"],
        intermediate_size=settings["intermediate_size"],
        num_layers=1,
        num_heads=H,
        num_kv_heads=2,
        head_dim=K,
        mixers=("lightning",),
        norm_eps=settings["rms_norm_eps"],
        rope_theta=settings["rope_theta"],
        lightning=LightningConfig(settings["lightning_nh"], settings["lightning_nkv"], settings["lightning_head_dim"]),
    )
    width = config.hidden_size
    inward = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "gate": "z_proj"}
    params = {name: golden[f"w.{theirs}.weight"].T.reshape(width, H, K) for name, theirs in inward.items()}
    params |= {name: golden[f"w.{name}.weight"] for name in ("q_norm", "k_norm")}
    params["o"] = golden["w.o_proj.weight"].T.reshape(H, K, width)
    params["o_norm"] = golden["w.o_norm.weight"].reshape(H, K)
    return config, params


def _context(x_BTD: np.ndarray, start: int = 0) -> Context:
    positions_BT = np.broadcast_to(np.arange(start, start + x_BTD.shape[1]), x_BTD.shape[:2])
    return Context(positions_BT, np.zeros_like(positions_BT))


def test_output(golden, layer):
    config, params = layer
    x_BTD = golden["hidden_states"]
    output = jax.jit(lightning.forward, static_argnums=1)(
        params, config, x_BTD, Context(_context(x_BTD).positions_BT[:1], None)
    )
    tolerance = golden["about"]["suggested_atol"]["output"]
    np.testing.assert_allclose(output, golden["output"], rtol=0, atol=tolerance)


def test_states_and_continuation(golden, layer):
    config, params = layer
    step = jax.jit(lightning.step, static_argnums=1)
    x_BTD, tolerance = golden["hidden_states"], golden["about"]["suggested_atol"]
    cache = lightning.init_cache(config, 2, 0, np.float32)
    first, cache = step(params, config, x_BTD[:, :67], _context(x_BTD[:, :67]), cache)
    np.testing.assert_allclose(cache["state"], golden["state_after_67"], rtol=0, atol=tolerance["state_after_67"])
    second, cache = step(params, config, x_BTD[:, 67:], _context(x_BTD[:, 67:], 67), cache)
    np.testing.assert_allclose(cache["state"], golden["final_state"], rtol=0, atol=tolerance["final_state"])
    both = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(both, golden["output"], rtol=0, atol=tolerance["output"])
