"""Run a stage's step on the devices that are here: random arrays for its abstract arguments, and steps by the clock."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

WARM_UP = 2


@dataclasses.dataclass
class Steps:
    """Seconds of consecutive steps: of waiting for the batch to lie on the devices, and of the step itself.

    losses: of every step, which is how a reader sees that the numbers computed with were numbers.
    """

    waiting: list[float]
    running: list[float]
    losses: list[float]

    @property
    def whole(self) -> list[float]:
        return [waited + ran for waited, ran in zip(self.waiting, self.running, strict=True)]


def timed_steps(
    step: Callable[..., Any], state: Any, frozen: Any, batches: Iterable[dict[str, jax.Array]]
) -> tuple[Any, Steps]:
    """One step a batch, each waited for, so that the next batch is fetched by an idle host; (state, seconds).

    A run overlaps the two: it fetches a batch while the devices work on the one before.
    """
    found = Steps([], [], [])
    iterator = iter(batches)
    while True:
        start = time.perf_counter()
        batch = next(iterator, None)
        if batch is None:
            return state, found
        jax.block_until_ready(batch)
        ready = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready((state, metrics))
        found.waiting.append(ready - start)
        found.running.append(time.perf_counter() - ready)
        found.losses.append(float(metrics["loss"]))


def random_arrays(tree: Any, seed: int) -> Any:
    """Arrays for abstract ones, each made where it is to lie: noise for matrices, ones for vectors, zero counts.

    Moments ("opt_state" in the path) are noise without a sign, as second moments are.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    made = []
    for number, (path, leaf) in enumerate(leaves):
        signed = "opt_state" not in jax.tree_util.keystr(path)
        draw = _drawing(leaf.shape, jnp.dtype(leaf.dtype), signed, leaf.sharding)
        made.append(draw(jax.random.fold_in(jax.random.key(seed), number)))
    return jax.tree_util.tree_unflatten(structure, made)


@functools.lru_cache(maxsize=128)
def _drawing(shape: tuple[int, ...], dtype: Any, signed: bool, sharding: Any) -> Callable[[jax.Array], jax.Array]:
    """A compiled function from a key to one array: layers are alike, so that few of them are compiled."""

    def draw(key: jax.Array) -> jax.Array:
        if not jnp.issubdtype(dtype, jnp.floating):
            return jnp.zeros(shape, dtype)
        if len(shape) < 2:
            return jnp.ones(shape, dtype)
        noise = 0.02 * jax.random.normal(key, shape)
        return (noise if signed else jnp.abs(noise)).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)
