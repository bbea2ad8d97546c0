"""Stage 1 of HALO: every layer's Lightning mixer learns to give what the teacher's attention gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hypenet_jax.model import LanguageModel, mixers, stack


def alignment_loss(teacher: LanguageModel, student: LanguageModel) -> Callable:
    """loss(mixer_params, teacher_params, batch) -> (mean squared error, metrics) for the training loop.

    The frozen teacher's residual stream feeds every layer, and each layer's student mixer gets the teacher mixer's
    input; the error between the two outputs is averaged over layers, tokens and width (arXiv 2601.22156, stage 1).
    `student` is all Lightning; mixer_params is {"layer_i": mixer parameters}. Nothing above the last layer's mixer
    is computed: neither the last SwiGLU nor any logits. A layer's gradient is made with its error, as no other layer
    has a part in it: what it is made from is held for one layer at a time.
    """
    last = student.config.num_layers - 1

    def loss(mixer_params: dict, teacher_params: dict, batch: dict):
        teacher_params = jax.lax.stop_gradient(teacher_params)
        errors, counts = [], []

        def mix(layer, normed_BTD, context):
            wanted = mixers.attention.forward(
                teacher_params[f"layer_{layer}"]["mixer"], teacher.config, normed_BTD, context
            )
            # The context's ids, because layers may see the tokens in another order than the batch's.
            weights_BT = (context.segment_ids_BT >= 0).astype(jnp.float32)

            def error(own):
                got = mixers.lightning.forward(own, student.config, normed_BTD, context)
                squared_BT = jnp.mean(jnp.square((got - wanted).astype(jnp.float32)), axis=-1)
                return jnp.sum(squared_BT * weights_BT)

            value, output = _at_once(error)(mixer_params[f"layer_{layer}"], wanted)
            errors.append(value)
            counts.append(jnp.sum(weights_BT))
            return jax.lax.stop_gradient(output)

        stack.forward(
            teacher_params,
            teacher.config,
            batch["tokens"],
            batch["segment_ids"],
            dtype=jnp.dtype(teacher.dtype),
            mix=mix,
            exchange=teacher.exchange,
        )
        count = jnp.maximum(counts[0], 1.0)
        per_layer = jnp.stack(errors) / count
        metrics = {"count": count, "first_layer": per_layer[0], "last_layer": per_layer[last]}
        return jnp.mean(per_layer), metrics

    return loss


def _at_once(error: Callable) -> Callable:
    """(params, stream) -> (error(params), stream); differentiated, the gradient is made before the stream goes on.

    Without the barrier the compiler puts the gradients of all layers last and holds what all of them are made from.
    """

    @jax.custom_vjp
    def both(params: Any, stream: jax.Array) -> tuple[jax.Array, jax.Array]:
        return error(params), stream

    def forward(params: Any, stream: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
        value, gradient = jax.value_and_grad(error)(params)
        value, gradient, stream = jax.lax.optimization_barrier((value, gradient, stream))
        return (value, stream), gradient

    def backward(gradient: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(lambda leaf: (cotangents[0] * leaf).astype(leaf.dtype), gradient), None

    both.defvjp(forward, backward)
    return both


def mixers_of(params: dict, num_layers: int) -> dict:
    """{"layer_i": mixer parameters} of a full parameter tree: what stage 1 trains."""
    return {f"layer_{i}": params[f"layer_{i}"]["mixer"] for i in range(num_layers)}


def with_mixers(params: dict, mixer_params: dict) -> dict:
    """The full tree with the named layers' mixers replaced."""
    replaced = {name: params[name] | {"mixer": mixer} for name, mixer in mixer_params.items()}
    return params | replaced
