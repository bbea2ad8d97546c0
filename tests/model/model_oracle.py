"""The network once more in float64 numpy, one document and one token at a time: slow and plainly right."""

from __future__ import annotations

import math

import numpy as np

from hypenet_jax.model import ModelConfig


def norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / math.sqrt(np.mean(x * x) + eps) * scale


def rotate(x: np.ndarray, position: int, config: ModelConfig) -> np.ndarray:
    half = len(x) // 2
    result = np.empty_like(x)
    for i in range(half):
        angle = position * config.rope_theta ** (-i / half)
        result[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        result[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return result


def slopes(heads: int) -> list[float]:
    if heads & (heads - 1) == 0:
        return [2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)]
    below = 1 << (heads.bit_length() - 1)
    return slopes(below) + slopes(2 * below)[::2][: heads - below]


def heads(x_TD: np.ndarray, weights: dict, name: str, normed: bool, rope: bool, config: ModelConfig) -> np.ndarray:
    """[T, D] to [T, H, K], with the norm and the rotation where asked for."""
    out_THK = np.einsum("td,dhk->thk", x_TD, weights[name])
    for t, h in np.ndindex(*out_THK.shape[:2]):
        if normed:
            out_THK[t, h] = norm(out_THK[t, h], weights[f"{name}_norm"], config.norm_eps)
        if rope:
            out_THK[t, h] = rotate(out_THK[t, h], t, config)
    return out_THK


def query_scale(t: int, config: ModelConfig) -> float:
    scaling = config.logits_scaling
    if scaling is None:
        return 1.0
    return scaling.value if scaling.kind == "constant" else math.log(t + scaling.value) / math.log(scaling.value)


def attention(x_TD: np.ndarray, weights: dict, config: ModelConfig) -> np.ndarray:
    q, k = (heads(x_TD, weights, name, config.qk_norm, config.attention_rope, config) for name in "qk")
    v = heads(x_TD, weights, "v", False, False, config)
    group = config.num_heads // config.num_kv_heads
    o_THK = np.zeros_like(q)
    for t, h in np.ndindex(*q.shape[:2]):
        scores = k[: t + 1, h // group] @ q[t, h] * query_scale(t, config) / math.sqrt(config.head_dim)
        weight = np.exp(scores - scores.max())
        o_THK[t, h] = weight @ v[: t + 1, h // group] / weight.sum()
    if config.attention_gate:
        o_THK = o_THK / (1 + np.exp(-np.einsum("td,dhk->thk", x_TD, weights["gate"])))
    return np.einsum("thk,hkd->td", o_THK, weights["o"])


def lightning(x_TD: np.ndarray, weights: dict, config: ModelConfig) -> np.ndarray:
    settings = config.lightning
    q, k = (heads(x_TD, weights, name, settings.qk_norm, settings.rope, config) for name in "qk")
    v = heads(x_TD, weights, "v", False, False, config)
    group = settings.num_heads // settings.num_kv_heads
    scale = {"1/sqrt(d)": 1 / math.sqrt(settings.head_dim), "1/d": 1 / settings.head_dim}.get(settings.scale, 1.0)
    o_THK = np.zeros_like(q)
    for h, slope in enumerate(slopes(settings.num_heads)):
        state_KV = np.zeros((settings.head_dim, settings.head_dim))
        for t in range(len(x_TD)):
            state_KV = math.exp(-slope) * state_KV + np.outer(k[t, h // group], v[t, h // group])
            o_THK[t, h] = scale * q[t, h] @ state_KV
    if settings.output_norm:
        o_THK = np.stack([norm(o_HK, weights["o_norm"], config.norm_eps) for o_HK in o_THK])
    if settings.output_gate:
        o_THK = o_THK / (1 + np.exp(-np.einsum("td,dhk->thk", x_TD, weights["gate"])))
    return np.einsum("thk,hkd->td", o_THK, weights["o"])


def logits(params: dict, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """float64 [T, V] of one document."""
    x_TD = params["embedding"][tokens]
    for layer, mixer in enumerate(config.mixers):
        weights = params[f"layer_{layer}"]
        normed = np.stack([norm(x_D, weights["input_norm"], config.norm_eps) for x_D in x_TD])
        x_TD = x_TD + {"attention": attention, "lightning": lightning}[mixer](normed, weights["mixer"], config)
        normed = np.stack([norm(x_D, weights["post_norm"], config.norm_eps) for x_D in x_TD])
        gate = normed @ weights["mlp"]["gate"]
        x_TD = x_TD + (gate / (1 + np.exp(-gate)) * (normed @ weights["mlp"]["up"])) @ weights["mlp"]["down"]
    normed = np.stack([norm(x_D, params["final_norm"], config.norm_eps) for x_D in x_TD])
    return normed @ params.get("lm_head", params["embedding"].T)
