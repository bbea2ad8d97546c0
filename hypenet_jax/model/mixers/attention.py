"""Softmax attention with grouped queries: Qwen3's and Llama's layer, and HypeNet's NoPE layer with an output gate."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hypenet_jax.model.config import ModelConfig
from hypenet_jax.model.context import Context
from hypenet_jax.model.layers import apply_rope, merge_heads, project_heads, rms_norm, rope_frequencies
from hypenet_jax.model.parameters import Parameter, Table, linear_default, ones
from hypenet_jax.parallel import sharded_kernels as kernel
from hypenet_jax.parallel.activations import constrain, sequence_shards


def parameters(config: ModelConfig) -> Table:
    """q, k, v, o projections; q_norm, k_norm with `qk_norm`; gate (W_g) with `attention_gate`."""
    width, heads, kv_heads, head_dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    table = {
        "q": Parameter((width, heads, head_dim), ("embed", "heads", "head_dim")),
        "k": Parameter((width, kv_heads, head_dim), ("embed", "kv_heads", "head_dim")),
        "v": Parameter((width, kv_heads, head_dim), ("embed", "kv_heads", "head_dim")),
        "o": Parameter((heads, head_dim, width), ("heads", "head_dim", "embed")),
    }
    if config.qk_norm:
        table |= {name: Parameter((head_dim,), ("norm",), ones) for name in ("q_norm", "k_norm")}
    if config.attention_gate:
        table["gate"] = Parameter((width, heads, head_dim), ("embed", "heads", "head_dim"), linear_default(width))
    return table


def forward(params: dict, config: ModelConfig, x_BTD: jax.Array, context: Context) -> jax.Array:
    """y = (softmax(s_t q k^T / sqrt(d)) v * sigmoid(x W_g)) W_o, causal inside each document; facts: arXiv 2601.22156.

    x_BTD is the normed residual stream; the result is [B, T, D] in x's dtype.
    """
    return _gate_and_merge(params, config, x_BTD, heads(params, config, x_BTD, context))


def heads(params: dict, config: ModelConfig, x_BTD: jax.Array, context: Context) -> jax.Array:
    """The heads' outputs [B, T, H, d], before gate and output projection."""
    q, k, v = _queries_keys_values(params, config, x_BTD, context.positions_BT)
    scale = context.query_scale_BT
    if scale is not None and scale.shape[0] == 1:
        scale = scale[0]
    return kernel.attention(q, k, v, segment_ids=context.segment_ids_BT, logit_scale_T=scale, exchange=context.exchange)


def init_cache(config: ModelConfig, batch: int, max_len: int, dtype: jnp.dtype) -> dict:
    """Preallocated keys and values, [batch, max_len, kv heads, head_dim]; slot = position."""
    shards = sequence_shards()
    shape = (batch, -(-max_len // shards) * shards, config.num_kv_heads, config.head_dim)
    empty = constrain(jnp.zeros(shape, dtype), "batch", "length", "act_kv_heads", "head_dim")
    return {"k": empty, "v": jnp.copy(empty)}


def step(params: dict, config: ModelConfig, x_BTD: jax.Array, context: Context, cache: dict) -> tuple[jax.Array, dict]:
    """Append T tokens to the cache and attend to everything up to each; negative ids mark padding, never stored."""
    assert context.segment_ids_BT is not None
    positions_BT = jnp.where(context.segment_ids_BT >= 0, context.positions_BT, -1)
    q, k, v = _queries_keys_values(params, config, x_BTD, positions_BT)
    stored = {"k": kernel.stored(cache["k"], k, positions_BT), "v": kernel.stored(cache["v"], v, positions_BT)}
    scale, split = context.query_scale_BT, context.exchange is not None
    o = kernel.cached_attention(q, stored["k"], stored["v"], positions_BT, logit_scale_BT=scale, split=split)
    return _gate_and_merge(params, config, x_BTD, o), stored


def _queries_keys_values(params: dict, config: ModelConfig, x_BTD: jax.Array, positions_BT: jax.Array):
    q, k, v = (project_heads(x_BTD, params[name]) for name in ("q", "k", "v"))
    if config.qk_norm:
        q, k = rms_norm(q, params["q_norm"], config.norm_eps), rms_norm(k, params["k_norm"], config.norm_eps)
    if config.attention_rope:
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        q, k = apply_rope(q, positions_BT, frequencies), apply_rope(k, positions_BT, frequencies)
    return q, k, v


def _gate_and_merge(params: dict, config: ModelConfig, x_BTD: jax.Array, o_BTHD: jax.Array) -> jax.Array:
    if config.attention_gate:
        o_BTHD = o_BTHD * jax.nn.sigmoid(project_heads(x_BTD, params["gate"]))
    return merge_heads(o_BTHD, params["o"])


def from_attention(teacher: dict, config: ModelConfig, key: jax.Array, start: str) -> dict:
    """Parameters of this layer out of a teacher's attention layer: everything copied, the gate new.

    start "official": a random gate, which halves and scrambles the output. "calibrated": a zero gate, sigmoid(0) = 1/2,
    with the output projection doubled, so that the gate is the identity at step 0. "random-gates": a random gate, whose
    mean of 1/2 the doubled output projection makes up for. "unit-norms": the calibrated start's gate.
    """
    student = {name: teacher[name] for name in parameters(config) if name in teacher}
    return add_output_gate(student, parameters(config).get("gate"), key, start)


def add_output_gate(mixer: dict, gate: Parameter | None, key: jax.Array, start: str) -> dict:
    """The mixer with a new output gate of either start; as it is where the gate is switched off (None)."""
    if gate is None:
        return mixer
    random = start in ("official", "random-gates")
    new = gate.init(key, gate.shape, jnp.float32) if random else jnp.zeros(gate.shape, jnp.float32)
    return mixer | {"gate": new} | ({} if start == "official" else {"o": 2.0 * mixer["o"]})
