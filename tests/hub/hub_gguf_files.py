"""Small GGUF files written with the gguf package, as llama.cpp's converter writes them."""

from __future__ import annotations

import pathlib

import gguf
import numpy as np

from hypenet_jax.model import ModelConfig

# GPT-2's characters for the bytes of the tests' texts: printable ones stand for themselves, a space is Ġ.
SPACE, NEWLINE = "\u0120", "\u010a"
BYTES = [*(chr(i) for i in range(33, 127)), SPACE, NEWLINE, "\u00c3", "\u00a9", "\u00cc", "\u0123"]
MERGES = ["1 2", "12 3", "c a", "ca t", f"{SPACE} cat", "' s", f"{SPACE} 12", f"{NEWLINE} {NEWLINE}"]
SPECIALS = [("<|end|>", 3), ("<|turn|>", 3), ("<tool>", 4), ("[PAD]", 5)]


def tokens_and_types() -> tuple[list[str], list[int]]:
    merged = [merge.replace(" ", "") for merge in MERGES]
    tokens = [name for name, _ in SPECIALS[:1]] + BYTES + merged + [name for name, _ in SPECIALS[1:]]
    kinds = dict(SPECIALS)
    return tokens, [kinds.get(token, 1) for token in tokens]


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """[out, in] with the two halves of every head's rows interleaved, in plain loops."""
    rows, width = weight.copy(), weight.shape[0] // heads
    for head in range(heads):
        for j in range(width // 2):
            for half in range(2):
                rows[head * width + 2 * j + half] = weight[head * width + half * (width // 2) + j]
    return rows


def stored_tensors(config: ModelConfig, params: dict) -> dict[str, np.ndarray]:
    """GGUF name -> [out, in] array, written out by hand."""

    def heads_out(weight):
        return weight.transpose(1, 2, 0).reshape(-1, weight.shape[0])

    found = {"token_embd.weight": params["embedding"], "output_norm.weight": params["final_norm"]}
    if "lm_head" in params:
        found["output.weight"] = params["lm_head"].T
    for i in range(config.num_layers):
        layer, block = params[f"layer_{i}"], f"blk.{i}."
        mixer, mlp = layer["mixer"], layer["mlp"]
        q, k = heads_out(mixer["q"]), heads_out(mixer["k"])
        if config.family == "llama":
            q, k = permuted(q, config.num_heads), permuted(k, config.num_kv_heads)
        else:
            found |= {f"{block}attn_q_norm.weight": mixer["q_norm"], f"{block}attn_k_norm.weight": mixer["k_norm"]}
        found |= {
            f"{block}attn_norm.weight": layer["input_norm"],
            f"{block}ffn_norm.weight": layer["post_norm"],
            f"{block}attn_q.weight": q,
            f"{block}attn_k.weight": k,
            f"{block}attn_v.weight": heads_out(mixer["v"]),
            f"{block}attn_output.weight": mixer["o"].reshape(-1, config.hidden_size).T,
            f"{block}ffn_gate.weight": mlp["gate"].T,
            f"{block}ffn_up.weight": mlp["up"].T,
            f"{block}ffn_down.weight": mlp["down"].T,
        }
    return found


def write_gguf(
    path: pathlib.Path,
    config: ModelConfig,
    tensors: dict[str, np.ndarray],
    quantisation: str = "F32",
    pre: str | None = "smollm",
    arch: str | None = None,
    extra: dict | None = None,
) -> pathlib.Path:
    """Metadata of `config`, a small tokenizer unless pre is None, matrices quantised where 32 divides their rows."""
    writer = gguf.GGUFWriter(path, arch or config.family)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if pre is not None:
        tokens, types = tokens_and_types()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(MERGES)
        writer.add_eos_token_id(tokens.index("<|end|>"))
        writer.add_eot_token_id(tokens.index("<|turn|>"))
    for key, value in (extra or {}).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key, value)
    kind = gguf.GGMLQuantizationType[quantisation]
    for name, array in tensors.items():
        array = np.ascontiguousarray(array, np.float32)
        if kind != gguf.GGMLQuantizationType.F32 and array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
