"""Tiny models for the hub's tests: configs of every family, random parameters, and directories written by hand."""

from __future__ import annotations

import itertools
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from hypenet_jax.model import LanguageModel, LightningConfig, LogitsScaling, ModelConfig, RopeScaling

LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
SIZES = {
    "vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "max_position": 512, "bos_id": 1, "eos_ids": (2, 3), "pad_id": 0,
}  # fmt: skip
ATTENTION = {"mixers": ("attention", "attention")}


def hypenets() -> list[ModelConfig]:
    """A HypeNet for every combination of switches that changes which parameters there are, and then some."""
    found = []
    for qk, norm, gate, attention_gate in itertools.product((False, True), repeat=4):
        lightning = LightningConfig(
            num_heads=4, num_kv_heads=4 if qk else 2, head_dim=8, rope=norm, qk_norm=qk, output_norm=norm,
            output_gate=gate, scale="1/d" if gate else "1/sqrt(d)",
        )  # fmt: skip
        found.append(
            ModelConfig(
                **SIZES,
                mixers=("lightning", "attention"),
                family="hypenet",
                tie_embeddings=norm,
                lightning=lightning,
                attention_gate=attention_gate,
                attention_rope=gate,
                qk_norm=not (gate and attention_gate),
                rope_scaling=LLAMA3 if attention_gate else None,
                logits_scaling=[None, LogitsScaling("hype", 500.0), LogitsScaling("constant", 1.5)][qk + norm],
            )  # fmt: skip
        )
    return found


CONFIGS = {
    "qwen3 tied": ModelConfig(**SIZES, **ATTENTION, family="qwen3", rope_theta=1e6),
    "qwen3 untied": ModelConfig(**SIZES, **ATTENTION, family="qwen3", tie_embeddings=False, norm_eps=1e-5),
    "llama": ModelConfig(**SIZES, **ATTENTION, family="llama", qk_norm=False, rope_theta=1e5),
    "llama3": ModelConfig(
        **SIZES, **ATTENTION, family="llama", qk_norm=False, rope_scaling=LLAMA3, tie_embeddings=False
    ),
    **{f"hypenet {i:04b}": config for i, config in enumerate(hypenets())},
}


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """float32 parameters of about unit scale (norm weights too, so that a swapped one shows)."""
    rng = np.random.default_rng(seed)

    def fill(shapes):
        if isinstance(shapes, dict):
            return {name: fill(entry) for name, entry in shapes.items()}
        return rng.standard_normal(shapes.shape).astype(np.float32)

    return fill(LanguageModel(config=config).param_shapes())


def flat(params: dict, path: tuple = ()) -> dict:
    """{(path): leaf}"""
    found = {}
    for name, entry in params.items():
        found |= flat(entry, (*path, name)) if isinstance(entry, dict) else {(*path, name): np.asarray(entry)}
    return found


def assert_same_bits(got: dict, wanted: dict) -> None:
    got, wanted = flat(got), flat(wanted)
    assert got.keys() == wanted.keys()
    for path, value in wanted.items():
        assert got[path].dtype == value.dtype, path
        np.testing.assert_array_equal(got[path].view(np.uint8), value.view(np.uint8), err_msg=str(path))


def write_directory(directory: pathlib.Path, config: dict, tensors: dict) -> pathlib.Path:
    """A Hugging Face directory of one safetensors file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, directory / "model.safetensors")
    return directory


def edit_json(path: pathlib.Path, **changes) -> None:
    """Set keys of a JSON file; a value of `...` deletes its key."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
