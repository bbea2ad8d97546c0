"""The losses in chunks of tokens, in plain XLA, for every platform and every option."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.cross_entropy import sweep
from kernels_pallas.cross_entropy.sweep import Static, Tokens
from kernels_pallas.cross_entropy.terms import Options
from kernels_pallas.dispatch import Backend


def linear_loss(weight, weight_teacher, tokens: Tokens, *, options: Options) -> jax.Array:
    """Sum over tokens of their shares of KL and cross entropy; see `sweep.total_loss`."""
    return _jitted(Static(options, sweep.plain_stage), weight, weight_teacher, tokens)


@partial(jax.jit, static_argnums=0)
def _jitted(static: Static, weight, weight_teacher, tokens: Tokens) -> jax.Array:
    if tokens.hidden.ndim == 2:
        tokens = jax.tree.map(lambda x: x[None], tokens)
    return sweep.total_loss(static, weight, weight_teacher, tokens)


def _refuses(*, weight, tokens: Tokens, options: Options) -> str | None:
    for name, x in (("hidden", tokens.hidden), ("weight", weight)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}, and it accumulates in float32 from float32 or bfloat16 only"
    return None


BACKEND = Backend("xla", linear_loss, _refuses)
