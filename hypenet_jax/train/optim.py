"""AdamW, gradient clipping and the learning rate of a stage."""

from __future__ import annotations

from typing import Any

import jax
import optax

from hypenet_jax.train.stage import StageConfig


def learning_rate(stage: StageConfig) -> optax.Schedule:
    """The schedule: `learning_rate(stage)(n)` is the learning rate of update n, n = 1 .. stage.steps.

    "cosine": n / warmup_steps * peak_lr up to n = warmup_steps, then half a cosine that ends at end_lr in the last
    update. "warmup_stable": the same warm-up, then peak_lr. "constant": peak_lr from the first update.
    Counting from 1 gives the first update a learning rate above 0 and the last one exactly end_lr.
    """
    if stage.schedule == "constant":
        return optax.constant_schedule(stage.peak_lr)
    if stage.schedule == "warmup_stable":
        if not stage.warmup_steps:
            return optax.constant_schedule(stage.peak_lr)
        return optax.linear_schedule(0.0, stage.peak_lr, stage.warmup_steps)
    if not stage.warmup_steps:
        return optax.cosine_decay_schedule(stage.peak_lr, stage.steps, alpha=stage.end_lr / stage.peak_lr)
    return optax.warmup_cosine_decay_schedule(0.0, stage.peak_lr, stage.warmup_steps, stage.steps, stage.end_lr)


def decays(params: Any) -> Any:
    """True for the parameters that weight decay applies to: all but the norms, known by "norm" in their name."""

    def is_matrix(path: tuple, _leaf: Any) -> bool:
        return "norm" not in jax.tree_util.keystr(path[-1:], simple=True)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(stage: StageConfig, schedule: optax.Schedule | None = None) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW; the moments have the dtype of the parameters.

    schedule: the learning rate of update n = 1, 2, ..., which may be traced; None is the stage's.
    """
    rate = learning_rate(stage) if schedule is None else schedule
    return optax.chain(
        optax.clip_by_global_norm(stage.clip_norm),
        optax.scale_by_adam(b1=stage.b1, b2=stage.b2, eps=stage.eps),
        optax.add_decayed_weights(stage.weight_decay, mask=decays) if stage.weight_decay else optax.identity(),
        # Optax counts updates from 0, `learning_rate` from 1.
        optax.scale_by_learning_rate(lambda count: rate(count + 1)),
    )
