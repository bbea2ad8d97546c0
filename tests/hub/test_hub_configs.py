"""config.json <-> ModelConfig: every key that matters, and a sentence for every one that is not supported."""

import dataclasses
import json

import pytest
from hub_models import CONFIGS, LLAMA3

from hypenet_jax.errors import HypenetError
from hypenet_jax.hub import read_config
from hypenet_jax.hub.families import FAMILIES
from hypenet_jax.hub.hypenet import parse_logits_scaling
from hypenet_jax.model import LogitsScaling
from hypenet_jax.model.serialize import config_from_dict, config_to_dict

BASE = {
    "vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
}  # fmt: skip
SCALING = {
    "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def read(family: str, **changes):
    values = {key: value for key, value in (BASE | changes).items() if value is not ...}
    return FAMILIES[family].read_config(values, "config.json")


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_again(name):
    config = CONFIGS[name]
    values = json.loads(json.dumps(FAMILIES[config.family].write_config(config)))
    assert FAMILIES[config.family].read_config(values, "config.json") == config


def test_head_width_and_kv_heads_have_defaults():
    config = read("llama", num_key_value_heads=...)
    assert (config.head_dim, config.num_kv_heads, config.norm_eps, config.rope_theta) == (6, 4, 1e-5, 5e5)
    assert read("qwen3", head_dim=16).head_dim == 16


def test_rope_scaling_old_and_new():
    old = read("llama", rope_scaling={"rope_type": "llama3", **SCALING})
    oldest = read("llama", rope_scaling={"type": "llama3", **SCALING})
    new = read("llama", rope_theta=..., rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **SCALING})
    assert old == oldest == new
    assert old.rope_scaling == LLAMA3 and old.rope_theta == 5e5
    plain = read("qwen3", rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert plain.rope_scaling is None and plain.rope_theta == 1e6


def test_end_tokens_are_a_number_or_a_list():
    assert read("llama", eos_token_id=2).eos_ids == (2,)
    assert read("llama", eos_token_id=[5, 6]).eos_ids == (5, 6)
    assert read("llama").eos_ids == ()


def test_generation_config_adds_end_tokens(tmp_path):
    values = {**BASE, "model_type": "qwen3", "eos_token_id": 5}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5], "pad_token_id": 4}))
    config = read_config(tmp_path)
    assert config.eos_ids == (5, 4) and config.pad_id == 4 and config.bos_id is None


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (None, None),
        ("hype", LogitsScaling("hype", 362.0)),
        ("hype 500", LogitsScaling("hype", 500.0)),
        ("hype 12.5", LogitsScaling("hype", 12.5)),
        (1.5, LogitsScaling("constant", 1.5)),
        (2, LogitsScaling("constant", 2.0)),
        ("1.5", LogitsScaling("constant", 1.5)),
    ],
)
def test_logits_scaling(value, wanted):
    assert parse_logits_scaling(value, "config.json") == wanted


@pytest.mark.parametrize("value", ["yarn", "hype x", "hype 5 6", "", True, [500], "hype 1", "hype nan"])
def test_bad_logits_scaling(value):
    with pytest.raises(HypenetError, match="scaling"):
        parse_logits_scaling(value, "config.json")


def test_hypenet_switches_and_defaults():
    named = read(
        "hypenet",
        mixer_types=["lightning-attn", "attn"],
        attn_use_rope=False,
        attn_use_output_gate=True,
        lightning_nh=6,
        lightning_nkv=3,
        lightning_head_dim=4,
        lightning_scale="none",
        lightning_use_rope=False,
        lightning_use_qk_norm=True,
        lightning_use_output_gate=True,
        lightning_use_output_norm=True,
    )
    assert named.mixers == ("lightning", "attention")
    assert (named.attention_rope, named.attention_gate, named.qk_norm) == (False, True, True)
    assert dataclasses.astuple(named.lightning) == (6, 3, 4, False, True, True, True, "none")
    assert named.lightning.query_scale == 1.0
    # The official code's defaults.
    bare = read("hypenet", mixer_types=["lightning_attn", "attn"])
    assert dataclasses.astuple(bare.lightning) == (4, 2, 6, True, False, False, False, "1/sqrt(d)")
    assert (bare.attention_rope, bare.attention_gate, bare.logits_scaling) == (True, False, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types\[1\]"),
        ({"hidden_act": "gelu"}, "hidden_act .*'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling .*'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope_parameters .*'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        ({"num_experts": 8}, "num_experts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"vocab_size": "37"}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"num_attention_heads": 0}, "num_heads"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_unsupported_settings_are_named(family, changes, words):
    with pytest.raises(HypenetError, match=words):
        read(family, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mixer_types": ["attn", "gdn"]}, r"mixer_types\[1\] .*'gdn'"),
        ({"mixer_types": ["attn"]}, "1 entries"),
        ({"lightning_use_short_conv": True}, "lightning_use_short_conv"),
        ({"lightning_use_rope": "yes", "lightning_nh": 4}, "lightning_use_rope"),
    ],
)
def test_unsupported_hypenet_settings_are_named(changes, words):
    with pytest.raises(HypenetError, match=words):
        read("hypenet", **changes)


@pytest.mark.parametrize("setting", [{"attention_dropout": 0.1}, {"sliding_window": 4096, "use_sliding_window": False}])
def test_harmless_settings_are_ignored(setting):
    assert read("qwen3", **setting) == read("qwen3")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM.*HypeNetForCausalLM"),
        (
            {"architectures": ["Qwen3ForSequenceClassification"], "model_type": "qwen3"},
            "Qwen3ForSequenceClassification",
        ),
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({}, "model_type None"),
    ],
)
def test_unknown_architectures(tmp_path, values, words):
    (tmp_path / "config.json").write_text(json.dumps(BASE | values))
    with pytest.raises(HypenetError, match=words):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_broken_config_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(HypenetError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_hybrid_is_no_qwen3():
    hybrid = CONFIGS["hypenet 0000"]
    for family in ("qwen3", "llama"):
        with pytest.raises(HypenetError, match="hypenet"):
            FAMILIES[family].write_config(dataclasses.replace(hybrid, family=family))
    with pytest.raises(HypenetError, match="qk_norm"):
        FAMILIES["llama"].write_config(dataclasses.replace(CONFIGS["qwen3 tied"], family="llama"))


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_dict_round_trip(name):
    assert config_from_dict(json.loads(json.dumps(config_to_dict(CONFIGS[name])))) == CONFIGS[name]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"colour": 1}, "'colour'"),
        ({"lightning": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "shade": 1}}, "lightning.*'shade'"),
        ({"lightning": {"num_heads": 4}}, "'num_kv_heads'"),
        ({"rope_scaling": 3}, "rope_scaling"),
        ({"mixers": "attention"}, "mixers"),
        ({"num_heads": 3}, "num_heads"),
    ],
)
def test_bad_plain_dicts(changes, words):
    with pytest.raises(HypenetError, match=words):
        config_from_dict(config_to_dict(CONFIGS["llama"]) | changes)


def test_a_missing_key_of_a_plain_dict():
    values = config_to_dict(CONFIGS["llama"])
    del values["vocab_size"]
    with pytest.raises(HypenetError, match="vocab_size"):
        config_from_dict(values)
