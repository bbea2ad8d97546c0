"""Lightning attention as HypeNet uses it: a linear-attention RNN with one fixed decay a head."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hypenet_jax.model.config import LightningConfig, ModelConfig
from hypenet_jax.model.context import Context
from hypenet_jax.model.layers import apply_rope, merge_heads, project_heads, rms_norm, rope_frequencies
from hypenet_jax.model.mixers.attention import add_output_gate
from hypenet_jax.model.parameters import Parameter, Table, linear_default, ones
from hypenet_jax.parallel import sharded_kernels
from hypenet_jax.parallel.activations import constrain
from kernels_pallas import lightning as kernel


def parameters(config: ModelConfig) -> Table:
    """q, k, v, o projections; q_norm, k_norm, gate (W_z) and o_norm as switched on in `config.lightning`."""
    width, lightning = config.hidden_size, _settings(config)
    heads, kv_heads, head_dim = lightning.num_heads, lightning.num_kv_heads, lightning.head_dim
    table = {
        "q": Parameter((width, heads, head_dim), ("embed", "heads", "head_dim")),
        "k": Parameter((width, kv_heads, head_dim), ("embed", "heads", "head_dim")),
        "v": Parameter((width, kv_heads, head_dim), ("embed", "heads", "head_dim")),
        "o": Parameter((heads, head_dim, width), ("heads", "head_dim", "embed")),
    }
    if lightning.qk_norm:
        table |= {name: Parameter((head_dim,), ("norm",), ones) for name in ("q_norm", "k_norm")}
    if lightning.output_gate:
        table["gate"] = Parameter((width, heads, head_dim), ("embed", "heads", "head_dim"), linear_default(width))
    if lightning.output_norm:
        table["o_norm"] = Parameter((heads, head_dim), ("heads", "head_dim"), ones)
    return table


def forward(params: dict, config: ModelConfig, x_BTD: jax.Array, context: Context) -> jax.Array:
    """y = (RMSNorm(o) * sigmoid(x W_z)) W_o with o_t = q_t S_t / sqrt(d), S_t = exp(-s_h) S_{t-1} + k_t^T v_t.

    x_BTD is the normed residual stream; the result is [B, T, D] in x's dtype (arXiv 2601.22156, Lightning layer).
    """
    return _mix(params, config, x_BTD, context, None)[0]


def init_cache(config: ModelConfig, batch: int, max_len: int, dtype: jnp.dtype) -> dict:
    """The recurrent state, float32 [batch, heads, head_dim, head_dim], whatever the length."""
    lightning = _settings(config)
    zeros = jnp.zeros((batch, lightning.num_heads, lightning.head_dim, lightning.head_dim), jnp.float32)
    return {"state": constrain(zeros, "batch", "act_heads", "head_dim", "head_dim")}


def step(params: dict, config: ModelConfig, x_BTD: jax.Array, context: Context, cache: dict) -> tuple[jax.Array, dict]:
    """Run T more tokens from the cached state; negative ids mark padding, which leaves the state untouched."""
    y, state = _mix(params, config, x_BTD, context, cache["state"])
    return y, {"state": state}


def heads(params: dict, config: ModelConfig, x_BTD: jax.Array, context: Context) -> jax.Array:
    """The recurrence's outputs [B, T, H, d], before output norm, gate and output projection."""
    return _recurrence(params, config, x_BTD, context, None)[0]


def _recurrence(params: dict, config: ModelConfig, x_BTD: jax.Array, context: Context, state: jax.Array | None):
    lightning = _settings(config)
    q, k, v = (project_heads(x_BTD, params[name]) for name in ("q", "k", "v"))
    if lightning.qk_norm:
        q, k = rms_norm(q, params["q_norm"], config.norm_eps), rms_norm(k, params["k_norm"], config.norm_eps)
    if lightning.rope:
        frequencies = rope_frequencies(lightning.head_dim, config.rope_theta, config.rope_scaling)
        q, k = apply_rope(q, context.positions_BT, frequencies), apply_rope(k, context.positions_BT, frequencies)
    groups = lightning.num_heads // lightning.num_kv_heads
    if groups > 1:
        k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)
    return _scan(q, k, v, lightning, context, state)


def _mix(params: dict, config: ModelConfig, x_BTD: jax.Array, context: Context, state: jax.Array | None):
    lightning = _settings(config)
    o, state = _recurrence(params, config, x_BTD, context, state)
    if lightning.output_norm:
        o = rms_norm(o, params["o_norm"], config.norm_eps)
    if lightning.output_gate:
        o = o * jax.nn.sigmoid(project_heads(x_BTD, params["gate"]))
    return merge_heads(o, params["o"]), state


def _scan(q_BTHK, k_BTHK, v_BTHV, lightning: LightningConfig, context: Context, state):
    decay_slopes, scale = kernel.slopes(lightning.num_heads), lightning.query_scale
    segment_ids_BT = context.segment_ids_BT
    if state is not None and q_BTHK.shape[1] == 1:
        assert segment_ids_BT is not None
        valid_B = segment_ids_BT[:, 0] >= 0
        o_BHV, state = kernel.lightning_decode_step(
            q_BTHK[:, 0], k_BTHK[:, 0], v_BTHV[:, 0], decay_slopes, state, scale=scale, valid_B=valid_B
        )
        return o_BHV[:, None], state
    return sharded_kernels.lightning_attention(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        decay_slopes,
        scale=scale,
        initial_state=state,
        segment_ids=segment_ids_BT,
        zigzag=context.exchange is not None,
    )


def _settings(config: ModelConfig) -> LightningConfig:
    assert config.lightning is not None  # ModelConfig refuses a lightning layer without its settings
    return config.lightning


def from_attention(teacher: dict, config: ModelConfig, key: jax.Array, start: str) -> dict:
    """Parameters of this layer out of a teacher's attention layer (HALO's weight transfer, arXiv 2601.22156).

    Projections and q/k norms are copied, every key and value head is cloned in place to serve its group's query
    heads (0,0,1,1,...), the output norm is ones, and the gate is new: see `attention.from_attention` for `start`. q/k
    norms that the teacher lacks are ones, which keeps the direction of its queries and keys.
    """
    lightning = _settings(config)
    wanted = parameters(config)
    copied = [name for name in ("q", "o", "q_norm", "k_norm") if name in wanted and name in teacher]
    student: dict[str, jax.Array] = {name: teacher[name] for name in copied}
    for name in ("k", "v"):
        clones = lightning.num_kv_heads // teacher[name].shape[1]
        student[name] = jnp.repeat(teacher[name], clones, axis=1)
    for name in ("q_norm", "k_norm"):
        if name in wanted and name not in student:
            student[name] = jnp.ones(wanted[name].shape, jnp.float32)
    if lightning.output_norm:
        student["o_norm"] = jnp.ones((lightning.num_heads, lightning.head_dim), jnp.float32)
    return add_output_gate(student, parameters(config).get("gate"), key, start)
