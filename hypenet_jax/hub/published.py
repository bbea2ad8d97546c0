"""Sizes of published teachers by name, so that a run can be planned before their weights are here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hypenet_jax.errors import HypenetError
from hypenet_jax.hub.loading import read_config
from hypenet_jax.model import ModelConfig

_QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "num_kv_heads": 8,
    "head_dim": 128,
    "family": "qwen3",
    "rope_theta": 1e6,
    "max_position": 40960,
    "eos_ids": (151645,),
    "pad_id": 151645,
}
_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "head_dim": 64,
    "family": "llama",
    "qk_norm": False,
    "norm_eps": 1e-5,
    "rope_theta": 1e5,
    "max_position": 8192,
    "eos_ids": (2,),
    "pad_id": 2,
}
# What config.json of the model on the Hugging Face Hub says.
_SIZES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {"num_layers": 28, "hidden_size": 1024, "intermediate_size": 3072, "num_heads": 16},
    "qwen3-1.7b": {"num_layers": 28, "hidden_size": 2048, "intermediate_size": 6144, "num_heads": 16},
    "qwen3-4b": {"num_layers": 36, "hidden_size": 2560, "intermediate_size": 9728, "num_heads": 32},
    "qwen3-8b": {"num_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "num_heads": 32},
}
_SIZES |= {
    "smollm2-135m": _SMOLLM2
    | {"num_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_heads": 9, "num_kv_heads": 3},
}
_UNTIED = ("qwen3-8b",)


def published(name: str) -> ModelConfig | None:
    """The config of a published model, by the last part of a path or name in any case; None for others."""
    key = Path(name).name.lower()
    if key not in _SIZES:
        return None
    sizes = _QWEN3 | _SIZES[key]
    return ModelConfig(**sizes, mixers=("attention",) * sizes["num_layers"], tie_embeddings=key not in _UNTIED)


def config_of(path: str | os.PathLike[str]) -> ModelConfig:
    """The config of a model without its weights: of a directory with a config.json, or by its published name.

    Raises:
      HypenetError: neither.
    """
    if Path(path).expanduser().is_dir():
        return read_config(path)
    known = published(str(path))
    if known is None:
        raise HypenetError(
            f"there is no model at {path}, and {Path(path).name!r} is none whose sizes we know "
            f"({', '.join(_SIZES)}); give a directory with its config.json"
        )
    return known
