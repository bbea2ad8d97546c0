"""The GGUF names of llama and qwen3 models. Weights are [out, in], as Hugging Face's, except for Llama's q and k."""

from __future__ import annotations

from hypenet_jax.hub import names
from hypenet_jax.hub.layout import Row, Tensor
from hypenet_jax.model.config import ModelConfig

MODEL = (
    Row("token_embd.weight", ("embedding",), "V D", "V D"),
    Row("output_norm.weight", ("final_norm",), "D", "D"),
)
HEAD = Row("output.weight", ("lm_head",), "V D", "D V")

_LAYER = "blk.{layer}."
BLOCK = (
    Row(_LAYER + "attn_norm.weight", ("input_norm",), "D", "D"),
    Row(_LAYER + "ffn_norm.weight", ("post_norm",), "D", "D"),
    Row(_LAYER + "ffn_gate.weight", ("mlp", "gate"), "F D", "D F"),
    Row(_LAYER + "ffn_up.weight", ("mlp", "up"), "F D", "D F"),
    Row(_LAYER + "ffn_down.weight", ("mlp", "down"), "D F", "F D"),
    Row(_LAYER + "attn_v.weight", ("mixer", "v"), "(K d) D", "D K d"),
    Row(_LAYER + "attn_output.weight", ("mixer", "o"), "D (H d)", "H d D"),
)
# llama.cpp rotates a Llama's neighbouring pairs (0,1), (2,3), ... where Hugging Face rotates (0,d/2), (1,d/2+1), ...;
# its converter interleaves the two halves of every head's rows to make up for that.
INTERLEAVED = (
    Row(_LAYER + "attn_q.weight", ("mixer", "q"), "(H half pair) D", "D H (pair half)"),
    Row(_LAYER + "attn_k.weight", ("mixer", "k"), "(K half pair) D", "D K (pair half)"),
)
HALVES = (
    Row(_LAYER + "attn_q.weight", ("mixer", "q"), "(H d) D", "D H d"),
    Row(_LAYER + "attn_k.weight", ("mixer", "k"), "(K d) D", "D K d"),
)
QK_NORM = (
    Row(_LAYER + "attn_q_norm.weight", ("mixer", "q_norm"), "d", "d"),
    Row(_LAYER + "attn_k_norm.weight", ("mixer", "k_norm"), "d", "d"),
)

LAYER = {"llama": (*BLOCK, *INTERLEAVED), "qwen3": (*BLOCK, *HALVES, *QK_NORM)}


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor that the GGUF file of a llama or qwen3 model holds, beside Llama 3's rope_freqs."""
    model = MODEL if config.tie_embeddings else (*MODEL, HEAD)
    return names.fill(config, model, lambda config, layer: LAYER[config.family])
