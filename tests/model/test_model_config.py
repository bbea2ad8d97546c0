"""Every mistake in a config is one sentence that names the field and its value."""

from __future__ import annotations

import dataclasses

import pytest

from hypenet_jax.errors import HypenetError
from hypenet_jax.model import LanguageModel, LightningConfig, LogitsScaling, RopeScaling


def _one_sentence(error: pytest.ExceptionInfo, *parts: str) -> None:
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message and not message.endswith("."), message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"vocab_size": 0}, ("vocab_size", "0")),
        ({"hidden_size": -4}, ("hidden_size", "-4")),
        ({"num_kv_heads": 0}, ("num_kv_heads", "0")),
        ({"num_kv_heads": 3}, ("num_heads", "4", "num_kv_heads", "3")),
        ({"head_dim": 7}, ("head_dim", "7", "even")),
        ({"head_dim": 0}, ("head_dim", "0")),
        ({"family": "gpt2"}, ("family", "'gpt2'", "qwen3")),
        ({"num_layers": 5}, ("mixers has 3 entries", "5 layers")),
        ({"mixers": ("attention", "mamba", "lightning")}, ("layer 1", "'mamba'", "lightning")),
        ({"lightning": None}, ("lightning", "missing")),
    ],
)
def test_model_config_names_the_field(tiny_config, overrides, parts):
    config = tiny_config("lal")
    with pytest.raises(HypenetError) as error:
        dataclasses.replace(config, **overrides)
    _one_sentence(error, *parts)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"num_heads": 4, "num_kv_heads": 3, "head_dim": 8}, ("lightning num_heads", "4", "3")),
        ({"num_heads": 4, "num_kv_heads": 0, "head_dim": 8}, ("lightning num_kv_heads", "0")),
        ({"num_heads": 4, "num_kv_heads": 4, "head_dim": 5}, ("lightning head_dim", "5")),
    ],
)
def test_lightning_config_names_the_field(settings, parts):
    with pytest.raises(HypenetError) as error:
        LightningConfig(**settings)
    _one_sentence(error, *parts)


@pytest.mark.parametrize("kind, value", [("hype", 1.0), ("hype", float("nan")), ("constant", 0.0), ("none", 2.0)])
def test_logits_scaling_names_the_value(kind, value):
    with pytest.raises(HypenetError) as error:
        LogitsScaling(kind, value)
    _one_sentence(error, "logits_scaling", kind)


@pytest.mark.parametrize(
    "fields, part",
    [((0.0, 1.0, 4.0, 8192), "factor"), ((8.0, 4.0, 1.0, 8192), "low_freq_factor"), ((8.0, 1.0, 4.0, 0), "original")],
)
def test_rope_scaling_names_the_field(fields, part):
    with pytest.raises(HypenetError) as error:
        RopeScaling(*fields)
    _one_sentence(error, part)


def test_scale_names():
    sizes = {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16}
    assert LightningConfig(**sizes).query_scale == 0.25
    assert LightningConfig(**sizes, scale="1/d").query_scale == 1 / 16
    assert LightningConfig(**sizes, scale="none").query_scale == 1.0


def test_with_logits_scaling_changes_that_alone(tiny_config):
    model = LanguageModel(tiny_config("la"), "bfloat16", remat=True)
    scaled = model.with_logits_scaling(500)
    assert scaled.config.logits_scaling == LogitsScaling("hype", 500.0)
    assert scaled.with_logits_scaling(None) == model
    constant = LogitsScaling("constant", 1.5)
    assert model.with_logits_scaling(constant).config.logits_scaling == constant
    assert hash(scaled) != hash(model) and hash(scaled.with_logits_scaling(None)) == hash(model)


def test_attention_layers(tiny_config):
    assert tiny_config("lalla").attention_layers == (1, 4)
