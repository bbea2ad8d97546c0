"""Qwen3 (dense): softmax attention with RoPE and a norm on every head's queries and keys."""

from __future__ import annotations

from typing import Any

from hypenet_jax.hub import names
from hypenet_jax.hub.config_json import Values, common_fields, common_values, refuse_hybrid
from hypenet_jax.hub.layout import Tensor
from hypenet_jax.model.config import ModelConfig

MODEL_TYPE = "qwen3"
ARCHITECTURES = ("Qwen3ForCausalLM",)
LAYER = (*names.BLOCK, *names.PROJECTIONS, *names.QK_NORM)


def read_config(values: Values, where: str) -> ModelConfig:
    """config.json as a ModelConfig; raises HypenetError for a setting that is not supported."""
    fields = common_fields(values, where)
    mixers = ("attention",) * fields["num_layers"]
    return ModelConfig(**fields, family="qwen3", mixers=mixers, qk_norm=True, attention_rope=True)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """A ModelConfig as config.json; raises HypenetError for a network that is no Qwen3."""
    refuse_hybrid(config, qk_norm=True)
    return {
        "architectures": list(ARCHITECTURES),
        "model_type": MODEL_TYPE,
        **common_values(config),
        "sliding_window": None,
        "use_sliding_window": False,
    }


def tensors(config: ModelConfig) -> list[Tensor]:
    return names.fill(config, names.model_rows(config), lambda config, layer: LAYER)
