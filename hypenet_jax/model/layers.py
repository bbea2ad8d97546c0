"""The parts that every layer shares: RMSNorm, rotary positions, SwiGLU, the query scaling of HyPE. Pure functions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hypenet_jax.model.config import LogitsScaling, RopeScaling
from hypenet_jax.parallel.activations import constrain
from hypenet_jax.parallel.weights import gathered


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the trailing axes that `scale` has; statistics in float32, cast back to x's dtype, then weighted.

    A scale [d] normalises every head alone; a scale [H, d] all heads jointly (HypeNet's output norm, whose mean
    square becomes a cross-device sum when heads are sharded).
    """
    axes = tuple(range(-scale.ndim, 0))
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
    return (x32 * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype) * scale.astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Angular frequencies [head_dim / 2] in radians a token, float32, with Llama 3's stretching where given.

    Wavelengths longer than original_max_position / low_freq_factor are stretched by `factor`, those shorter than
    original_max_position / high_freq_factor are kept, the ones between are interpolated (Llama 3 reference code).
    """
    frequency = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        turns = scaling.original_max_position * frequency / (2 * np.pi)
        kept = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    return frequency.astype(np.float32)


def apply_rope(x_BTHD: jax.Array, positions_BT: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotate by position: dimension i pairs with i + D/2 (Qwen3's and Llama's convention). Angles are float32."""
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies
    # Behind a barrier, or XLA makes every cosine anew for each head: on an H100 the norm and RoPE of a bfloat16
    # [1, 32768, 16, 128] took 2.41 ms instead of 0.26 (docs/decisions/0015).
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]))
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHD.dtype)


def query_scaling(scaling: LogitsScaling | None, positions_BT: jax.Array) -> jax.Array | None:
    """s_t, float32 in the shape of positions, or None: ln(t + a) / ln(a) with t from 0, or a constant."""
    if scaling is None:
        return None
    if scaling.kind == "constant":
        return jnp.full(positions_BT.shape, scaling.value, jnp.float32)
    return hype_scaling(scaling.value, positions_BT)


def hype_scaling(a: jax.Array | float, positions_BT: jax.Array) -> jax.Array:
    """s_t = ln(t + a) / ln(a), float32 in the shape of positions, t from 0 (arXiv 2601.22156, HyPE)."""
    a = jnp.asarray(a, jnp.float32)
    return jnp.log(positions_BT.astype(jnp.float32) + a) / jnp.log(a)


def swiglu(params: dict, x_BTD: jax.Array) -> jax.Array:
    """down(silu(gate(x)) * up(x)); params gate, up [D, F], down [F, D]."""
    gate, up = (gathered(params[name], x_BTD.dtype, "embed", "mlp") for name in ("gate", "up"))
    down = gathered(params["down"], x_BTD.dtype, "mlp", "embed")
    hidden_BTF = constrain(jax.nn.silu(x_BTD @ gate) * (x_BTD @ up), "batch", "length", "act_mlp")
    return hidden_BTF @ down


def project_heads(x_BTD: jax.Array, kernel_DHK: jax.Array) -> jax.Array:
    """[B, T, D] by [D, H, K] to [B, T, H, K], in x's dtype."""
    return jnp.einsum("btd,dhk->bthk", x_BTD, gathered(kernel_DHK, x_BTD.dtype, "embed", "heads", "head_dim"))


def merge_heads(o_BTHK: jax.Array, kernel_HKD: jax.Array) -> jax.Array:
    """[B, T, H, K] by [H, K, D] to [B, T, D], in o's dtype."""
    return jnp.einsum("bthk,hkd->btd", o_BTHK, gathered(kernel_HKD, o_BTHK.dtype, "heads", "head_dim", "embed"))
