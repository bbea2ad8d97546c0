"""Run a stage's step on the devices that are here: random arrays for its abstract arguments, and steps by the clock."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WARM_UP = 2


@dataclasses.dataclass
class Steps:
    """Seconds of consecutive steps: of waiting for the batch to lie on the devices, and of the step itself.

    losses, norms: of every step, the loss and the gradient's global norm: how a reader sees that the numbers computed
    with were numbers, and the same on every mesh.
    """

    waiting: list[float]
    running: list[float]
    losses: list[float]
    norms: list[float]

    @property
    def whole(self) -> list[float]:
        return [waited + ran for waited, ran in zip(self.waiting, self.running, strict=True)]


def timed_steps(
    step: Callable[..., Any], state: Any, frozen: Any, batches: Iterable[dict[str, jax.Array]]
) -> tuple[Any, Steps]:
    """One step a batch, each waited for, so that the next batch is fetched by an idle host; (state, seconds).

    A run overlaps the two: it fetches a batch while the devices work on the one before.
    """
    found = Steps([], [], [], [])
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
        found.norms.append(float(metrics["grad_norm"]))


def random_arrays(tree: Any, seed: int) -> Any:
    """Arrays for abstract ones, each made where it is to lie: noise for matrices, ones for vectors, zero counts.

    They are the same however they are divided. Moments ("opt_state" in the path) are noise without a sign, as second
    moments are.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    made = []
    for number, (path, leaf) in enumerate(leaves):
        signed = "opt_state" not in jax.tree_util.keystr(path)
        draw = _drawing(leaf.shape, jnp.dtype(leaf.dtype), signed, leaf.sharding)
        # Numbers of the host's: with several processes the array lies on devices that no process has all of.
        made.append(draw(np.uint32(seed), np.uint32(number)))
    return jax.tree_util.tree_unflatten(structure, made)


@functools.lru_cache(maxsize=128)
def _drawing(shape: tuple[int, ...], dtype: Any, signed: bool, sharding: Any) -> Callable[..., jax.Array]:
    """A compiled function from two numbers to one array: layers are alike, so that few of them are compiled."""

    def draw(seed: jax.Array, number: jax.Array) -> jax.Array:
        if not jnp.issubdtype(dtype, jnp.floating):
            return jnp.zeros(shape, dtype)
        if len(shape) < 2:
            return jnp.ones(shape, dtype)
        noise = 0.02 * jax.random.normal(jax.random.fold_in(jax.random.key(seed), number), shape)
        return (noise if signed else jnp.abs(noise)).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)
