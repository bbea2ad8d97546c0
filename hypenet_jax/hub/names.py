"""The Hugging Face names that Qwen3, Llama and HypeNet share. Linear weights are stored [out, in]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypenet_jax.hub.layout import Row, Tensor
from hypenet_jax.model.config import ModelConfig

# D width, V vocabulary, F feed-forward width, H query heads, K key/value heads, d head width.
MODEL = (
    Row("model.embed_tokens.weight", ("embedding",), "V D", "V D"),
    Row("model.norm.weight", ("final_norm",), "D", "D"),
)
HEAD = Row("lm_head.weight", ("lm_head",), "V D", "D V")

_LAYER = "model.layers.{layer}."
BLOCK = (
    Row(_LAYER + "input_layernorm.weight", ("input_norm",), "D", "D"),
    Row(_LAYER + "post_attention_layernorm.weight", ("post_norm",), "D", "D"),
    Row(_LAYER + "mlp.gate_proj.weight", ("mlp", "gate"), "F D", "D F"),
    Row(_LAYER + "mlp.up_proj.weight", ("mlp", "up"), "F D", "D F"),
    Row(_LAYER + "mlp.down_proj.weight", ("mlp", "down"), "D F", "F D"),
)
PROJECTIONS = (
    Row(_LAYER + "self_attn.q_proj.weight", ("mixer", "q"), "(H d) D", "D H d"),
    Row(_LAYER + "self_attn.k_proj.weight", ("mixer", "k"), "(K d) D", "D K d"),
    Row(_LAYER + "self_attn.v_proj.weight", ("mixer", "v"), "(K d) D", "D K d"),
    Row(_LAYER + "self_attn.o_proj.weight", ("mixer", "o"), "D (H d)", "H d D"),
)
QK_NORM = (
    Row(_LAYER + "self_attn.q_norm.weight", ("mixer", "q_norm"), "d", "d"),
    Row(_LAYER + "self_attn.k_norm.weight", ("mixer", "k_norm"), "d", "d"),
)
ATTENTION_GATE = (Row(_LAYER + "self_attn.o_gate.weight", ("mixer", "gate"), "(H d) D", "D H d"),)
LIGHTNING_GATE = (Row(_LAYER + "self_attn.z_proj.weight", ("mixer", "gate"), "(H d) D", "D H d"),)
LIGHTNING_NORM = (Row(_LAYER + "self_attn.o_norm.weight", ("mixer", "o_norm"), "(H d)", "H d"),)


def fill(
    config: ModelConfig, model_rows: Sequence[Row], layer_rows: Callable[[ModelConfig, int], Sequence[Row]]
) -> list[Tensor]:
    """Every tensor of a model, in the order of the network."""
    tensors = [Tensor(row.name, row.path, row.theirs, row.ours, sizes(config)) for row in model_rows]
    for layer in range(config.num_layers):
        here = sizes(config, layer)
        for row in layer_rows(config, layer):
            name, path = row.name.format(layer=layer), (f"layer_{layer}", *row.path)
            tensors.append(Tensor(name, path, row.theirs, row.ours, here))
    return tensors


def sizes(config: ModelConfig, layer: int | None = None) -> dict[str, int]:
    """The sizes behind the dimension names; a Lightning layer has its own heads."""
    heads: tuple[int, int, int] = (config.num_heads, config.num_kv_heads, config.head_dim)
    if layer is not None and config.mixers[layer] == "lightning" and config.lightning is not None:
        heads = (config.lightning.num_heads, config.lightning.num_kv_heads, config.lightning.head_dim)
    query, key, width = heads
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "H": query,
        "K": key,
        "d": width,
        # RoPE's two halves, for layouts that interleave them.
        "pair": 2,
        "half": width // 2,
    }


def model_rows(config: ModelConfig) -> tuple[Row, ...]:
    return MODEL if config.tie_embeddings else (*MODEL, HEAD)
