"""HypeNet (arXiv 2601.22156): attention and Lightning layers mixed, in the layout of the official code."""

from __future__ import annotations

from typing import Any

from hypenet_jax.errors import HypenetError
from hypenet_jax.hub import names
from hypenet_jax.hub.config_json import Values, boolean, common_fields, common_values, integer
from hypenet_jax.hub.layout import Row, Tensor
from hypenet_jax.model.config import DEFAULT_HYPE_A, LightningConfig, LogitsScaling, ModelConfig

MODEL_TYPE = "hypenet"
# The first is what we write; the published 2B checkpoint uses the second.
ARCHITECTURES = ("HypeNetForCausalLM", "HybridForCausalLM")

_MIXER_NAMES = {"attention": "attn", "lightning": "lightning-attn"}
_MIXERS = {"attn": "attention", "lightning-attn": "lightning", "lightning_attn": "lightning"}


def read_config(values: Values, where: str) -> ModelConfig:
    """config.json as a ModelConfig; an absent switch has the value that the official code gives it.

    `attn_use_qk_norm` is a key of ours, written only when false: the official attention layers always norm.

    Raises:
      HypenetError: an unknown mixer or a setting that is not supported.
    """
    fields = common_fields(values, where)
    mixers = _read_mixers(values, fields["num_layers"], where)
    return ModelConfig(
        **fields,
        family="hypenet",
        mixers=mixers,
        qk_norm=boolean(values, "attn_use_qk_norm", where, default=True),
        attention_rope=boolean(values, "attn_use_rope", where, default=True),
        attention_gate=boolean(values, "attn_use_output_gate", where, default=False),
        logits_scaling=parse_logits_scaling(values.get("attn_logits_scaling"), where),
        lightning=_read_lightning(values, fields, where) if "lightning" in mixers or _names_heads(values) else None,
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """A ModelConfig as config.json."""
    values = {
        "architectures": list(ARCHITECTURES[:1]),
        "model_type": MODEL_TYPE,
        **common_values(config),
        "mixer_types": [_MIXER_NAMES[mixer] for mixer in config.mixers],
        "attn_use_rope": config.attention_rope,
        "attn_use_output_gate": config.attention_gate,
        "attn_logits_scaling": format_logits_scaling(config.logits_scaling),
    }
    if not config.qk_norm:
        values["attn_use_qk_norm"] = False
    lightning = config.lightning
    if lightning is not None:
        values |= {
            "lightning_use_rope": lightning.rope,
            "lightning_use_qk_norm": lightning.qk_norm,
            "lightning_use_output_norm": lightning.output_norm,
            "lightning_use_output_gate": lightning.output_gate,
            "lightning_nh": lightning.num_heads,
            "lightning_nkv": lightning.num_kv_heads,
            "lightning_head_dim": lightning.head_dim,
            "lightning_scale": lightning.scale,
            # How the official code is told that K and V were cloned from the teacher's heads.
            "expand_kv_proj": lightning.num_kv_heads > config.num_kv_heads,
        }
    return values


def tensors(config: ModelConfig) -> list[Tensor]:
    return names.fill(config, names.model_rows(config), _layer_rows)


def parse_logits_scaling(value: Any, where: str) -> LogitsScaling | None:
    """null, "hype" (a = 362), "hype 500", or a constant as a number or a numeric string."""
    if value is None:
        return None
    words = value.split() if isinstance(value, str) else [value]
    try:
        if isinstance(value, bool) or not words or len(words) > 2:
            raise ValueError(value)
        if words[0] == "hype":
            return LogitsScaling("hype", float(words[1]) if len(words) == 2 else DEFAULT_HYPE_A)
        (constant,) = words
        return LogitsScaling("constant", float(constant))
    except HypenetError:
        raise
    except (TypeError, ValueError):
        raise HypenetError(
            f"attn_logits_scaling in {where} is {value!r}; use null, 'hype', 'hype 500' or a number"
        ) from None


def format_logits_scaling(scaling: LogitsScaling | None) -> str | float | None:
    """The inverse of `parse_logits_scaling`. The official code takes a constant only as a float."""
    if scaling is None:
        return None
    if scaling.kind == "constant":
        return float(scaling.value)
    whole = float(scaling.value).is_integer()
    return f"hype {int(scaling.value) if whole else repr(float(scaling.value))}"


def _layer_rows(config: ModelConfig, layer: int) -> tuple[Row, ...]:
    rows: tuple[Row, ...] = (*names.BLOCK, *names.PROJECTIONS)
    lightning = config.lightning
    if config.mixers[layer] == "lightning" and lightning is not None:
        rows += names.QK_NORM if lightning.qk_norm else ()
        rows += names.LIGHTNING_NORM if lightning.output_norm else ()
        return rows + (names.LIGHTNING_GATE if lightning.output_gate else ())
    rows += names.QK_NORM if config.qk_norm else ()
    return rows + (names.ATTENTION_GATE if config.attention_gate else ())


def _read_mixers(values: Values, num_layers: int, where: str) -> tuple[str, ...]:
    listed = values.get("mixer_types") or ["attn"] * num_layers
    if not isinstance(listed, list):
        raise HypenetError(f"mixer_types in {where} is {listed!r}; it must be a list of one mixer a layer")
    for layer, name in enumerate(listed):
        if not isinstance(name, str) or name not in _MIXERS:
            raise HypenetError(
                f"mixer_types[{layer}] in {where} is {name!r}, which is not supported; use 'attn' or 'lightning-attn'"
            )
    return tuple(_MIXERS[name] for name in listed)


def _names_heads(values: Values) -> bool:
    return values.get("lightning_nh") is not None


def _read_lightning(values: Values, fields: dict[str, Any], where: str) -> LightningConfig:
    scale = values.get("lightning_scale", "1/sqrt(d)")
    return LightningConfig(
        num_heads=integer(values, "lightning_nh", where, default=fields["num_heads"]),
        num_kv_heads=integer(values, "lightning_nkv", where, default=fields["num_kv_heads"]),
        head_dim=integer(values, "lightning_head_dim", where, default=fields["head_dim"]),
        rope=boolean(values, "lightning_use_rope", where, default=True),
        qk_norm=boolean(values, "lightning_use_qk_norm", where, default=False),
        output_norm=boolean(values, "lightning_use_output_norm", where, default=False),
        output_gate=boolean(values, "lightning_use_output_gate", where, default=False),
        scale=str(scale),
    )
