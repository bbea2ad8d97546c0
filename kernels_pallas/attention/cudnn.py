"""Softmax attention by cuDNN, through JAX's public entry: the fastest for whole sequences on NVIDIA GPUs.

It has no documents and no padding: its packed layout is not reachable through public arguments.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas import compat
from kernels_pallas.dispatch import Backend


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    causal: bool,
    segment_ids: None,
    scale: float,
    logit_scale: jax.Array | None,
) -> jax.Array:
    """See `api.attention`. With `logit_scale`, q is scaled in float32 and rounded to its dtype once more."""
    del segment_ids  # refused
    if logit_scale is not None:
        factor = jax.lax.stop_gradient(logit_scale.astype(jnp.float32))[..., None, None]
        q_BTHD = (q_BTHD.astype(jnp.float32) * factor).astype(q_BTHD.dtype)
    return _attend(causal, scale)(q_BTHD, k_BSKD, v_BSKD)


def _attend(causal: bool, scale: float):
    return partial(jax.nn.dot_product_attention, is_causal=causal, scale=scale, implementation="cudnn")


def _refuses(*, q_BTHD, k_BSKD, v_BSKD, causal, segment_ids, **call) -> str | None:
    if compat.platform() != "gpu":
        return f"it runs on a GPU and this is {compat.platform()}"
    if segment_ids is not None:
        return "it has no masks of documents and padding"
    dtypes = {x.dtype for x in (q_BTHD, k_BSKD, v_BSKD)}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}:
        return f"q, k, v are {q_BTHD.dtype}, {k_BSKD.dtype}, {v_BSKD.dtype}, and it takes bfloat16 or float16"
    if k_BSKD.shape != v_BSKD.shape or k_BSKD.shape[3] > 128:
        return f"k and v are {k_BSKD.shape[3]} and {v_BSKD.shape[3]} wide, and it takes one width up to 128"
    try:
        # The gradient too: some lengths only the forward takes, and nobody knows yet what will be differentiated.
        jax.eval_shape(partial(jax.vjp, _attend(causal, 1.0)), q_BTHD, k_BSKD, v_BSKD)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as refusal:
        return f"JAX says: {refusal}"  # no cuDNN here, or not for these shapes
    return None


BACKEND = Backend("cudnn", attention, _refuses)
