"""Choosing the next token: greedy, temperature, top-k, top-p, with a random stream of its own for every row."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from hypenet_jax.errors import HypenetError

# Below it quotients leave float32; at it any difference of logits decides already.
_COLDEST = 1e-30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits: divided by `temperature` (0 is greedy), then the `top_k` likeliest tokens,
    then the smallest set of the likeliest whose probability, renormalised, reaches `top_p`; None is no limit.

    Tokens that tie with the last one kept are kept too. The settings are compiled in: others compile anew. Raises
    HypenetError for values outside these meanings.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise HypenetError(f"temperature is {self.temperature}; it must be 0 (greedy) or a finite number above 0")
        if self.top_k is not None and (self.top_k != int(self.top_k) or self.top_k < 1):
            raise HypenetError(f"top_k is {self.top_k}; it must be a whole number of at least 1, or None for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise HypenetError(f"top_p is {self.top_p}; it must be above 0 and at most 1, or None for no limit")


def prompt_seed(seed: int, index: int) -> int:
    """The seed of the prompt at `index` of a list that is sampled with `seed`: 32 bits that do not repeat nearby."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


def sample(logits_BV: jax.Array, seeds_B: jax.Array, index: jax.Array | int, sampling: Sampling) -> jax.Array:
    """One token a row, int32 [B], from float32 logits [B, V]; pure, `sampling` is static.

    seeds_B uint32 [B]; `index` counts the row's new tokens from 0. A row's draw depends on its logits, its seed and
    `index` alone. The noise belongs to token ids, not to ranks: a rounding error that swaps two near ties in rank
    changes nothing else.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    temperature = max(sampling.temperature, _COLDEST)
    kept_BV = restrict(logits_BV.astype(jnp.float32) / temperature, sampling.top_k, sampling.top_p)
    keys_B = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), index))(seeds_B)
    return jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)


def restrict(logits_BV: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
    """The logits with -inf for every token that top_k and then top_p exclude."""
    vocab = logits_BV.shape[-1]
    count = vocab if top_k is None else min(top_k, vocab)
    mass = 1.0 if top_p is None else top_p
    if count == vocab and mass >= 1:
        return logits_BV
    best_BK = jax.lax.top_k(logits_BV, count)[0]
    lowest_B1 = best_BK[:, -1:]
    if mass < 1:
        probability_BK = jax.nn.softmax(best_BK, axis=-1)
        before_BK = jnp.cumsum(probability_BK, axis=-1) - probability_BK
        lowest_B1 = jnp.min(jnp.where(before_BK < mass, best_BK, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
