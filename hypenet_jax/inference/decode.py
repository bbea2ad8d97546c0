"""Decoding on the device, a burst of tokens a call: the host sees tokens, never logits."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hypenet_jax.inference.sampling import Sampling, sample
from hypenet_jax.model import LanguageModel
from hypenet_jax.parallel.activations import mesh_of
from hypenet_jax.parallel.processes import on_host

# Tokens a burst has room for. How many it decodes is an argument, so that one compilation serves all.
BURST = 32


class Decoding(NamedTuple):
    """Where a batch stands. A row that is done keeps its cache and yields nothing more."""

    cache: dict
    token_B: jax.Array  # int32, sampled and not yet in the cache
    done_B: jax.Array  # bool, a stop token was sampled
    sampled: jax.Array  # int32, new tokens so far, stop tokens included


def decode(
    model: LanguageModel,
    params: dict,
    cache: dict,
    logits_BV: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int],
    seeds_B: np.ndarray,
    bursts: Iterable[int],
) -> Iterator[np.ndarray]:
    """Yield int32 [B, n] tokens, -1 where a row has stopped, until all rows have or max_new_tokens are out.

    cache and logits_BV are prefill's results (the cache is consumed); seeds_B uint32 [B]. `bursts` says how many
    tokens each round trip to the device brings, at most BURST, and must not run dry. Rows without a prompt count as
    stopped. The next burst is started before a burst is handed out, so that the device works while the host reads.
    """
    stops = jnp.asarray(sorted(stop_ids), jnp.int32)
    with mesh_of(params):
        state, pending = _first(cache, logits_BV, stops, seeds_B, sampling)
    width, left = 1, max_new_tokens - 1
    for burst in bursts:
        steps = min(burst, BURST, left)
        if steps:
            with mesh_of(params):
                state, following = _burst(model, params, state, stops, seeds_B, steps, sampling)
        tokens_BN = on_host(pending)[:, :width]
        yield tokens_BN
        if not steps or (tokens_BN[:, -1] < 0).all():
            return
        pending, width, left = following, steps, left - steps


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="cache")
def _first(cache, logits_BV, stops, seeds_B, sampling):
    token_B = sample(logits_BV, seeds_B, 0, sampling)
    done_B = jnp.isin(token_B, stops) | (cache["length"] == 0)
    return Decoding(cache, token_B, done_B, jnp.int32(1)), _shown(token_B, done_B)[:, None]


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="state")
def _burst(model, params, state, stops, seeds_B, steps, sampling):
    def unfinished(carry):
        step, state, _ = carry
        return (step < steps) & ~jnp.all(state.done_B)

    def decode_one(carry):
        step, (cache, token_B, done_B, sampled), tokens_BN = carry
        hidden_B1D, cache = model.step(params, token_B[:, None], cache, ~done_B[:, None])
        token_B = sample(model.project(params, hidden_B1D[:, 0]), seeds_B, sampled, sampling)
        done_B = done_B | jnp.isin(token_B, stops)
        tokens_BN = tokens_BN.at[:, step].set(_shown(token_B, done_B))
        return step + 1, Decoding(cache, token_B, done_B, sampled + 1), tokens_BN

    empty_BN = jnp.full((state.token_B.shape[0], BURST), -1, jnp.int32)
    _, state, tokens_BN = jax.lax.while_loop(unfinished, decode_one, (0, state, empty_BN))
    return state, tokens_BN


def _shown(token_B: jax.Array, done_B: jax.Array) -> jax.Array:
    return jnp.where(done_B, -1, token_B)
