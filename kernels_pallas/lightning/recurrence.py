"""The differentiable recurrence around a backend's forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kernels_pallas.lightning.marks import Decay, log_decay_gradient


class Options(NamedTuple):
    """What is known when a kernel is compiled."""

    scale: float
    high: bool  # multiply matrices in float32
    interpret: bool = False
    short_memory: float | None = None  # bits, see `api.lightning_attention`
    wide: bool = False  # dq and dk in float32, whatever the inputs: a log decay's gradient is their small difference


class Passes(NamedTuple):
    """A backend.

    `forward(options, q, k, v, decay, initial_state, segment_ids)` gives `(o, state, saved)`;
    `backward(options, q, k, v, decay, initial_state, segment_ids, saved, do, dstate)` gives
    `(dq, dk, dv, dinitial_state)`. `saved` is whatever small thing the backward would rather not make again.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def backend_function(passes: Passes) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The function of a `dispatch.Backend`, with the arguments of `api.lightning_attention` and `api.simple_gla`."""

    def function(
        q_BTHK: jax.Array,
        k_BTHK: jax.Array,
        v_BTHV: jax.Array,
        *,
        slopes_H: ArrayLike | None = None,
        log_decay_BTH: jax.Array | None = None,
        scale: float,
        initial_state: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        precision: str = "default",
        short_memory: float | None = None,
        interpret: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        slopes_H = None if slopes_H is None else jnp.asarray(slopes_H, jnp.float32)
        options = Options(scale, precision == "high", interpret, short_memory)
        decay = Decay(slopes_H, log_decay_BTH)
        return _jitted(passes, options, q_BTHK, k_BTHK, v_BTHV, decay, initial_state, segment_ids)

    return function


@partial(jax.jit, static_argnums=(0, 1))
def _jitted(passes, options, q, k, v, decay, initial_state, segment_ids):
    if initial_state is None:
        # Zeros that vary over the same mesh axes as the inputs, which a scan inside shard_map asks for.
        initial_state = jnp.zeros_like(q[:, 0, :, :, None] * v[:, 0, :, None, :], jnp.float32)
    return _recurrence(passes, options, q, k, v, decay, initial_state, segment_ids)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recurrence(passes, options, q, k, v, decay, initial_state, segment_ids):
    o, state, _ = passes.forward(options, q, k, v, decay, initial_state.astype(jnp.float32), segment_ids)
    return o, state


def _forward(passes, options, q, k, v, decay, initial_state, segment_ids):
    o, state, saved = passes.forward(options, q, k, v, decay, initial_state.astype(jnp.float32), segment_ids)
    final = None if decay.log_decay_BTH is None else state
    return (o, state), (q, k, v, decay, initial_state, segment_ids, saved, final)


def _backward(passes, options, residuals, cotangents):
    q, k, v, decay, initial_state, segment_ids, saved, final = residuals
    do, dstate = cotangents
    start = initial_state.astype(jnp.float32)
    options = options._replace(wide=decay.log_decay_BTH is not None)
    dq, dk, dv, dinitial = passes.backward(options, q, k, v, decay, start, segment_ids, saved, do, dstate)
    ddecay = Decay(None if decay.slopes_H is None else jnp.zeros_like(decay.slopes_H), None)
    if decay.log_decay_BTH is not None:
        dlog = log_decay_gradient(q, k, dq, dk, final, dstate, segment_ids)
        ddecay = Decay(None, dlog.astype(decay.log_decay_BTH.dtype))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv, ddecay, dinitial.astype(initial_state.dtype), None


_recurrence.defvjp(_forward, _backward)
