"""The network: embedding, layers of mixer and SwiGLU, final norm. Pure functions over the parameter tree."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from hypenet_jax.model import mixers
from hypenet_jax.model.config import ModelConfig
from hypenet_jax.model.context import Context, training_context
from hypenet_jax.model.layers import hype_scaling, query_scaling, rms_norm, swiglu
from hypenet_jax.model.parameters import Parameter, Table, ones
from hypenet_jax.parallel.activations import constrain, sequence_shards
from hypenet_jax.parallel.sharded_kernels import along_rows, to_natural, to_zigzag
from hypenet_jax.parallel.weights import after

# mix(layer, normed_BTD, context) -> the mixer's output [B, T, D]
Mix = Callable[[int, jax.Array, Context], jax.Array]


def parameters(config: ModelConfig) -> Table:
    """The table of all parameters, in the layout of docs/checkpoints.md."""
    width, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    table: Table = {
        "embedding": Parameter((vocab, width), ("vocab", "embed")),
        "final_norm": Parameter((width,), ("norm",), ones),
    }
    if not config.tie_embeddings:
        table["lm_head"] = Parameter((width, vocab), ("embed", "vocab"))
    for layer, mixer in enumerate(config.mixers):
        table[f"layer_{layer}"] = {
            "input_norm": Parameter((width,), ("norm",), ones),
            "mixer": mixers.BY_NAME[mixer].parameters(config),
            "post_norm": Parameter((width,), ("norm",), ones),
            "mlp": {
                "gate": Parameter((width, ffn), ("embed", "mlp")),
                "up": Parameter((width, ffn), ("embed", "mlp")),
                "down": Parameter((ffn, width), ("mlp", "embed")),
            },
        }
    return table


def head(params: dict) -> jax.Array:
    """The output projection [D, V]: its own matrix, or the transposed embedding when tied."""
    return params["lm_head"] if "lm_head" in params else params["embedding"].T


def forward(
    params: dict,
    config: ModelConfig,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    mix: Mix | None = None,
    hype_a: jax.Array | None = None,
    exchange: str = "auto",
) -> jax.Array:
    """Hidden states after the final norm, [B, T, D] in `dtype`.

    `mix` replaces the layers' own mixers: alignment watches them and selection swaps them through it. `remat` keeps
    only each layer's input for the backward pass. `hype_a` overrides the config's query scaling by s_t of that a,
    which may be traced (fitting tries many).

    Under a mesh with seq > 1 the layers, and so `mix`, see rows filled up with padding to a multiple of 2 * seq tokens,
    in zigzag order; what comes back is in the caller's order. `exchange` is attention's (`parallel.sequence`).
    """
    length, shards = tokens_BT.shape[1], sequence_shards()
    if shards > 1:
        tokens_BT, segment_ids_BT = _filled_up(tokens_BT, segment_ids_BT, 2 * shards)
    context = training_context(tokens_BT, segment_ids_BT)
    context = context._replace(query_scale_BT=_query_scale(config, hype_a, context.positions_BT))
    if shards > 1:
        tokens_BT, positions, ids, scale = to_zigzag((tokens_BT, *context[:3]))
        context = Context(positions, ids, scale, exchange)
    x_BTD = before_BTD = _residual(jnp.asarray(params["embedding"])[tokens_BT].astype(dtype))
    for layer, mixer in enumerate(config.mixers):

        def run(x_BTD, before_BTD, layer=layer, mixer=mixer):
            # Gathered while the layer before is at work, not sooner.
            weights = after(before_BTD, params[f"layer_{layer}"])
            normed_BTD = rms_norm(x_BTD, weights["input_norm"], config.norm_eps)
            if mix is None:
                mixed = mixers.BY_NAME[mixer].forward(weights["mixer"], config, normed_BTD, context)
            else:
                mixed = mix(layer, normed_BTD, context)
            return _feed_forward(weights, config, x_BTD + mixed)

        x_BTD, before_BTD = (jax.checkpoint(run) if remat else run)(x_BTD, before_BTD), x_BTD
    hidden_BTD = rms_norm(x_BTD, params["final_norm"], config.norm_eps)
    return to_natural(hidden_BTD)[:, :length] if shards > 1 else hidden_BTD


def init_cache(config: ModelConfig, batch: int, max_len: int, dtype: DTypeLike = jnp.float32) -> dict:
    """{"length": int32 [B], "layers": one entry a layer}: keys and values by slot, or a recurrent state."""
    layers = tuple(mixers.BY_NAME[mixer].init_cache(config, batch, max_len, dtype) for mixer in config.mixers)
    return {"length": jnp.zeros((batch,), jnp.int32), "layers": layers}


def step(
    params: dict,
    config: ModelConfig,
    tokens_BT: jax.Array,
    cache: dict,
    valid_BT: jax.Array | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    hype_a: jax.Array | None = None,
) -> tuple[jax.Array, dict]:
    """Append T tokens to each row's cached sequence: a chunk of a prompt, or one decoded token.

    valid_BT (bool) marks real tokens; the others leave every cache as it was. Returns the hidden states [B, T, D]
    after the final norm and the new cache. The caller keeps the sequence within the cache's max_len. `hype_a`: see
    `forward`.

    Under a mesh with seq > 1 the cached positions are dealt out over it, and chunks of at least 2 * seq tokens too.
    """
    length, shards = tokens_BT.shape[1], sequence_shards()
    if valid_BT is None:
        valid_BT = jnp.ones(tokens_BT.shape, bool)
    split = shards > 1 and length >= 2 * shards
    if split:
        fill = ((0, 0), (0, -length % (2 * shards)))
        tokens_BT, valid_BT = jnp.pad(tokens_BT, fill), jnp.pad(valid_BT, fill)
    count_BT = along_rows(lambda valid_BT: jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32), valid_BT)
    positions_BT = jnp.maximum(cache["length"][:, None] + count_BT - 1, 0)
    ids_BT = jnp.where(valid_BT, 0, -1)
    context = Context(positions_BT, ids_BT, _query_scale(config, hype_a, positions_BT))
    if split:
        tokens_BT, positions, ids, scale = to_zigzag((tokens_BT, *context[:3]))
        context = Context(positions, ids, scale, "auto")
    x_BTD = _residual(jnp.asarray(params["embedding"])[tokens_BT].astype(dtype))
    layers = []
    for layer, mixer in enumerate(config.mixers):
        weights = params[f"layer_{layer}"]
        normed = rms_norm(x_BTD, weights["input_norm"], config.norm_eps)
        mixed, stored = mixers.BY_NAME[mixer].step(weights["mixer"], config, normed, context, cache["layers"][layer])
        layers.append(stored)
        x_BTD = _feed_forward(weights, config, x_BTD + mixed)
    hidden = rms_norm(x_BTD, params["final_norm"], config.norm_eps)
    if split:
        hidden = to_natural(hidden)[:, :length]
    return hidden, {"length": cache["length"] + count_BT[:, -1], "layers": tuple(layers)}


def _query_scale(config: ModelConfig, hype_a: jax.Array | None, positions_BT: jax.Array) -> jax.Array | None:
    if hype_a is not None:
        return hype_scaling(hype_a, positions_BT)
    return query_scaling(config.logits_scaling, positions_BT)


def _filled_up(tokens_BT: jax.Array, segment_ids_BT: jax.Array | None, multiple: int):
    """Tokens and ids with padding at the end, so that `multiple` divides the length."""
    missing = -tokens_BT.shape[1] % multiple
    if not missing:
        return tokens_BT, segment_ids_BT
    ids = jnp.zeros(tokens_BT.shape, jnp.int32) if segment_ids_BT is None else segment_ids_BT
    end = ((0, 0), (0, missing))
    return jnp.pad(tokens_BT, end), jnp.pad(ids, end, constant_values=-1)


def _feed_forward(weights: dict, config: ModelConfig, x_BTD: jax.Array) -> jax.Array:
    x_BTD = _residual(x_BTD)
    return _residual(x_BTD + swiglu(weights["mlp"], rms_norm(x_BTD, weights["post_norm"], config.norm_eps)))


def _residual(x_BTD: jax.Array) -> jax.Array:
    """Under a mesh every device holds whole rows of the residual stream, or XLA may split its width as the weights'."""
    return constrain(x_BTD, "batch", "length", "act_embed")
