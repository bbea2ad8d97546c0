"""What the config.json files of the families have in common, read and written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hypenet_jax.errors import HypenetError
from hypenet_jax.model.config import ModelConfig, RopeScaling

Values = Mapping[str, Any]

# Settings that change the network in a way that is not implemented, with the values under which they do not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_sliding_window": (None, False),
    "hidden_act": (None, "silu"),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_interleaved": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0, 1),
    "quantization_config": (None,),
    "lightning_use_short_conv": (None, False),
}


def common_fields(values: Values, where: str) -> dict[str, Any]:
    """The fields of ModelConfig that every family takes from the same keys.

    `values` is the parsed config.json and `where` its path, for messages.

    Raises:
      HypenetError: a missing key, a value of the wrong kind, or a setting that is not supported.
    """
    _refuse_unsupported(values, where)
    heads = integer(values, "num_attention_heads", where)
    hidden = integer(values, "hidden_size", where)
    theta, scaling = _rope(values, where)
    return {
        "vocab_size": integer(values, "vocab_size", where),
        "hidden_size": hidden,
        "intermediate_size": integer(values, "intermediate_size", where),
        "num_layers": integer(values, "num_hidden_layers", where),
        "num_heads": heads,
        "num_kv_heads": integer(values, "num_key_value_heads", where, default=heads),
        "head_dim": integer(values, "head_dim", where, default=hidden // max(heads, 1)),
        "tie_embeddings": boolean(values, "tie_word_embeddings", where, default=False),
        "norm_eps": number(values, "rms_norm_eps", where, default=1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position": integer(values, "max_position_embeddings", where, default=2048),
        "bos_id": token_id(values, "bos_token_id", where),
        "eos_ids": token_ids(values, "eos_token_id", where),
        "pad_id": token_id(values, "pad_token_id", where),
    }


def common_values(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that every family writes."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling_values(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        **token_values(config),
    }


def token_values(config: ModelConfig) -> dict[str, Any]:
    """The special tokens as Hugging Face writes them: one end token is a number, several are a list."""
    eos = list(config.eos_ids)
    return {
        "bos_token_id": config.bos_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
        "pad_token_id": config.pad_id,
    }


def refuse_hybrid(config: ModelConfig, *, qk_norm: bool) -> None:
    """Raise unless the network is a plain RoPE transformer of its family."""
    plain = {
        "mixers": (config.mixers, ("attention",) * config.num_layers),
        "qk_norm": (config.qk_norm, qk_norm),
        "attention_rope": (config.attention_rope, True),
        "attention_gate": (config.attention_gate, False),
        "logits_scaling": (config.logits_scaling, None),
    }
    for field, (value, wanted) in plain.items():
        if value != wanted:
            raise HypenetError(
                f"{field} is {value!r}, which a {config.family} checkpoint cannot hold; set the family to 'hypenet'"
            )


def integer(values: Values, key: str, where: str, default: int | None = None) -> int:
    value = _present(values, key, where, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1 << 31 or value % 1:
        raise HypenetError(f"{key} in {where} is {value!r}; it must be a whole number of at most 31 bits")
    return int(value)


def number(values: Values, key: str, where: str, default: float | None = None) -> float:
    value = _present(values, key, where, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise HypenetError(f"{key} in {where} is {value!r}; it must be a finite number")
    return float(value)


def boolean(values: Values, key: str, where: str, default: bool) -> bool:
    value = _present(values, key, where, default)
    if not isinstance(value, bool):
        raise HypenetError(f"{key} in {where} is {value!r}; it must be true or false")
    return value


def token_id(values: Values, key: str, where: str) -> int | None:
    return None if values.get(key) is None else integer(values, key, where)


def token_ids(values: Values, key: str, where: str) -> tuple[int, ...]:
    """A token id, a list of them, or nothing."""
    value = values.get(key)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(integer({key: entry}, key, where) for entry in listed)


def _present(values: Values, key: str, where: str, default: Any) -> Any:
    value = values.get(key)
    if value is None and default is None:
        raise HypenetError(f"{where} lacks the key {key!r}; the model cannot be built without it")
    return default if value is None else value


def _refuse_unsupported(values: Values, where: str) -> None:
    for key, harmless in _UNSUPPORTED.items():
        if values.get(key) not in harmless:
            wanted = " or ".join(repr(value) for value in harmless if value is not None) or "absent"
            raise HypenetError(f"{key} in {where} is {values[key]!r}, which is not supported; it must be {wanted}")
    for layer, kind in enumerate(values.get("layer_types") or ()):
        if kind != "full_attention":
            raise HypenetError(
                f"layer_types[{layer}] in {where} is {kind!r}, which is not supported; it must be 'full_attention'"
            )


def _rope(values: Values, where: str) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from rope_theta + rope_scaling or from the newer rope_parameters, which holds both."""
    key = "rope_scaling" if values.get("rope_parameters") is None else "rope_parameters"
    entry = values.get(key) or {}
    if not isinstance(entry, Mapping):
        raise HypenetError(f"{key} in {where} is {entry!r}; it must be a mapping or null")
    theta_source = entry if entry.get("rope_theta") is not None else values
    theta = number(theta_source, "rope_theta", where, default=10000.0)
    if entry.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise HypenetError(f"partial_rotary_factor in {where} is {entry['partial_rotary_factor']}; it must be 1")
    kind = entry.get("rope_type", entry.get("type", "default"))
    if kind in ("default", None):
        return theta, None
    if kind != "llama3":
        raise HypenetError(f"{key} in {where} is of type {kind!r}, which is not supported; it must be 'llama3' or null")
    return theta, RopeScaling(
        factor=number(entry, "factor", where),
        low_freq_factor=number(entry, "low_freq_factor", where),
        high_freq_factor=number(entry, "high_freq_factor", where),
        original_max_position=integer(entry, "original_max_position_embeddings", where),
    )


def _rope_scaling_values(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }
