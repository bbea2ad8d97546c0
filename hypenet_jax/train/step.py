"""One optimizer update as a jitted function, and the state it works on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hypenet_jax.parallel.processes import place
from hypenet_jax.parallel.rules import batch_sharding, replicated
from hypenet_jax.train.optim import learning_rate, make_optimizer
from hypenet_jax.train.stage import StageConfig

# loss_fn(params, frozen, batch) -> (loss, metrics): a scalar and a dict of scalars.
LossFn = Callable[[Any, Any, dict[str, jax.Array]], tuple[jax.Array, dict[str, jax.Array]]]


def abstract_state(params: Any, stage: StageConfig, shardings: Any, mesh: Mesh) -> dict[str, Any]:
    """The training state as jax.ShapeDtypeStruct with shardings: {"params", "opt_state", "step"}.

    Parameters and moments have the dtype `stage.weights` and share the parameters' shardings; counters are replicated.
    """
    optimizer = make_optimizer(stage)
    everywhere = replicated(mesh)

    def on_mesh(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    masters = jax.tree.map(
        lambda p, sharding: jax.ShapeDtypeStruct(p.shape, stage.weights, sharding=sharding), params, shardings
    )
    opt_state = optax.tree_map_params(
        optimizer,
        on_mesh,
        jax.eval_shape(optimizer.init, masters),
        shardings,
        transform_non_params=lambda leaf: on_mesh(leaf, everywhere),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return {"params": masters, "opt_state": opt_state, "step": step}


def create_state(params: Any, stage: StageConfig, abstract: dict[str, Any]) -> dict[str, Any]:
    """The state before the first update, laid out as `abstract` says.

    The masters are copies: the step donates its state, and the caller's arrays (which a frozen teacher may share) must
    outlive that. The moments are created where they live, never on one device first.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    masters = jax.tree.map(
        lambda p, sharding: place(p.astype(stage.weights), sharding, may_alias=False),
        params,
        shardings["params"],
    )
    init = jax.jit(make_optimizer(stage).init, out_shardings=shardings["opt_state"])
    step = place(np.zeros((), np.int32), shardings["step"])
    return {"params": masters, "opt_state": init(masters), "step": step}


def loss_and_gradients(
    loss_fn: LossFn, params: Any, frozen: Any, batch: dict[str, jax.Array], microbatches: int, mesh: Mesh
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """(loss, metrics, gradients) of a batch, computed in `microbatches` equal parts one after the other.

    The rule that makes the parts equal one big batch: loss and metrics of loss_fn are means over `metrics["count"]`
    items (say, unmasked tokens); parts are averaged with their counts as weights, and the counts are added. A loss_fn
    without "count" weighs its parts equally, which is right only if each is a mean over equally many items.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if microbatches == 1:
        (loss, metrics), gradients = value_and_grad(params, frozen, batch)
        return loss, metrics, gradients

    rows = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))

    def split(x: jax.Array) -> jax.Array:
        # Microbatch i takes rows i, i + microbatches, ...: each device splits its own rows, nothing moves.
        parts = x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(parts, rows)

    def one(microbatch: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        (loss, metrics), gradients = value_and_grad(params, frozen, microbatch)
        means = {name: value for name, value in metrics.items() if name != "count"}
        count = jnp.asarray(metrics.get("count", 1), jnp.float32)
        return count, jax.tree.map(lambda x: x.astype(jnp.float32) * count, (loss, means, gradients))

    def add(sums: Any, microbatch: dict[str, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, one(microbatch)), None

    parts = jax.tree.map(split, batch)
    names = jax.eval_shape(loss_fn, params, frozen, jax.tree.map(lambda x: x[0], parts))[1].keys()
    zero = jnp.zeros((), jnp.float32)
    sums_of = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    zeros = (zero, (zero, {name: zero for name in names if name != "count"}, sums_of))
    (count, sums), _ = jax.lax.scan(add, zeros, parts)
    loss, metrics, gradients = jax.tree.map(lambda x: x / jnp.maximum(count, 1), sums)
    return loss, metrics | ({"count": count} if "count" in names else {}), gradients


def update(
    loss_fn: LossFn,
    stage: StageConfig,
    mesh: Mesh,
    state: dict[str, Any],
    frozen: Any,
    batch: dict[str, jax.Array],
    schedule: optax.Schedule | None = None,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """One update: (state, frozen, batch) -> (state, metrics), to be jitted; see `make_step`, and `make_optimizer`."""
    schedule = learning_rate(stage) if schedule is None else schedule
    loss, metrics, gradients = loss_and_gradients(
        loss_fn, state["params"], frozen, batch, stage.gradient_accumulation, mesh
    )
    norm = optax.tree.norm(gradients)
    gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, state["params"])
    updates, opt_state = make_optimizer(stage, schedule).update(gradients, state["opt_state"], state["params"])
    step = state["step"] + 1
    scalars = {**metrics, "loss": loss, "lr": schedule(step), "grad_norm": norm}
    scalars = {name: jnp.asarray(value, jnp.float32) for name, value in scalars.items()}
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt_state": opt_state, "step": step}, scalars


def make_step(
    loss_fn: LossFn, stage: StageConfig, abstract: dict[str, Any], mesh: Mesh, donate: bool = True
) -> Callable[[dict[str, Any], Any, dict[str, jax.Array]], tuple[dict[str, Any], dict[str, jax.Array]]]:
    """The jitted update: (state, frozen, batch) -> (state, metrics); the state's buffers are reused when `donate`.

    metrics: float32 scalars "loss", "lr" (of this update), "grad_norm" (before clipping), and those of loss_fn.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        functools.partial(update, loss_fn, stage, mesh),
        in_shardings=(shardings, None, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=(0,) if donate else (),
    )
