"""Every layer mixes both ways, a gate between the two: the network and the loss of the joint gate search."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hypenet_jax.halo.settings import GateSearchConfig
from hypenet_jax.model import LanguageModel, mixers
from hypenet_jax.train.losses import distill_loss
from hypenet_jax.train.stage import StageConfig

# sigmoid is 0 or 1 to float32 beyond this distance.
_FAR, _HALVINGS = 60.0, 40


def pressed(scalar_L: jax.Array, share: jax.Array | float) -> jax.Array:
    """scalar + pressure, float32 [L], the one pressure being that for which the mean of sigmoid(..) is `share`.

    So the gates compete: what opens one closes the others. The pressure is found by halving; one Newton step from
    there, in which the found value is a constant, has the derivative of the exact solution.
    """
    scalar_L = scalar_L.astype(jnp.float32)
    fixed_L = jax.lax.stop_gradient(scalar_L)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.mean(jax.nn.sigmoid(fixed_L + middle)) > share
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    bounds = (-_FAR - jnp.max(fixed_L), _FAR - jnp.min(fixed_L))
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, bounds)
    found = (low + high) / 2
    gate_L = jax.nn.sigmoid(scalar_L + found)
    slope = jnp.mean(jax.lax.stop_gradient(gate_L * (1 - gate_L)))
    pressure = found - (jnp.mean(gate_L) - share) / jnp.maximum(slope, 1e-12)
    return scalar_L + pressure


def sampled_gates(pressed_L: jax.Array, uniform_BL: jax.Array, settings: GateSearchConfig) -> jax.Array:
    """Gates in [0, 1], float32 [B, L]: sigmoid((pressed + noise * logistic) / temperature), drawn for every row anew.

    The relaxed Bernoulli draw of arXiv 1611.00712: at a low temperature a row runs nearly one mixer or the other in
    each layer. Without the draw a layer that is open by a tenth may already give all that its attention is needed for.
    """
    u_BL = jnp.clip(uniform_BL, 1e-6, 1 - 1e-6)
    logistic_BL = jnp.log(u_BL) - jnp.log1p(-u_BL)
    return jax.nn.sigmoid((pressed_L + settings.noise * logistic_BL) / settings.temperature)


def open_share(settings: GateSearchConfig, num_layers: int, keep: int, progress: jax.Array) -> jax.Array:
    """The mean of the gates after `progress` in [0, 1] of the search: from `start_share` down to keep / L."""
    last = min(max(keep, 0.5), num_layers - 0.5) / num_layers
    pressed = jnp.minimum(progress / settings.pressed_by, 1.0)
    return settings.start_share + (last - settings.start_share) * pressed


def gated_hidden(teacher: LanguageModel, student: LanguageModel) -> Callable:
    """hidden(params, mixer_params, gate_BL, tokens_BT, segment_ids_BT) -> [B, T, D].

    Each layer of a row gives gate * the teacher's attention + (1 - gate) * its Lightning mixer, mixed in float32.
    """

    def hidden(params, mixer_params, gate_BL, tokens_BT, segment_ids_BT):
        def mix(layer, normed_BTD, context):
            own = mixers.attention.forward(params[f"layer_{layer}"]["mixer"], teacher.config, normed_BTD, context)
            new = mixers.lightning.forward(mixer_params[f"layer_{layer}"], student.config, normed_BTD, context)
            gate = gate_BL[:, layer, None, None]
            mixed = gate * own.astype(jnp.float32) + (1 - gate) * new.astype(jnp.float32)
            return mixed.astype(own.dtype)

        return teacher.hidden(params, tokens_BT, segment_ids_BT, mix=mix)

    return hidden


def gate_stage(settings: GateSearchConfig, token_chunk: int | None = None) -> StageConfig:
    """The search as a stage of training; its learning rate is the mixers', the gates' stands in a fixed ratio to it."""
    return StageConfig(
        steps=settings.steps,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        peak_lr=settings.mixer_lr,
        end_lr=0.1 * settings.mixer_lr,
        warmup_steps=min(10, settings.steps // 10),
        log_every=max(1, settings.steps // 50),
        keep=1,
        token_chunk=token_chunk,
    )


def gate_loss(
    teacher: LanguageModel, student: LanguageModel, settings: GateSearchConfig, keep: int, token_chunk: int | None
) -> Callable:
    """loss(params, frozen, batch) -> (KL(teacher || gated network), metrics) for the training loop.

    params: {"scalars": [L]} and, where they are trained, {"mixers": {"layer_i": ..}}; frozen: {"teacher", "mixers"}.
    The scalars count in units of gate_lr / mixer_lr, so that one optimizer moves gates and mixers at their own speeds.
    batch: "tokens", "segment_ids", "progress" [B, T] (the share of the search that this step completes) and "uniform"
    [B, T], of whose numbers in [0, 1) each row draws its gates. metrics: "open" and "gate_i", the means of the gates.
    """
    hidden, num_layers = gated_hidden(teacher, student), teacher.config.num_layers

    def loss(params: dict, frozen: dict, batch: dict):
        weights = jax.lax.stop_gradient(frozen["teacher"])
        share = open_share(settings, num_layers, keep, batch["progress"][0, 0])
        pressed_L = pressed(params["scalars"] * (settings.gate_lr / settings.mixer_lr), share)
        gate_BL = sampled_gates(pressed_L, batch["uniform"][:, :num_layers], settings)
        mixer_params = params["mixers"] if settings.trains == "mixers" else jax.lax.stop_gradient(frozen["mixers"])
        wanted = jax.lax.stop_gradient(teacher.hidden(weights, batch["tokens"], batch["segment_ids"]))
        got = hidden(weights, mixer_params, gate_BL, batch["tokens"], batch["segment_ids"])
        head = teacher.head(weights)
        value, metrics = distill_loss(got, head, wanted, head, batch, token_chunk=token_chunk)
        open_L = jax.nn.sigmoid(pressed_L)
        told = {f"gate_{layer}": open_L[layer] for layer in range(num_layers)}
        return value, metrics | {"open": jnp.mean(open_L)} | told

    return loss
