"""Softmax attention on a GPU (Pallas, Triton lowering): the backend, its block sizes, and its derivative."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import compat
from kernels_pallas.attention import gpu_blocks, gpu_decode
from kernels_pallas.attention.gpu_backward import backward
from kernels_pallas.attention.gpu_blocks import Tiles
from kernels_pallas.attention.gpu_forward import forward
from kernels_pallas.dispatch import Backend


class Sizes(NamedTuple):
    """Block sizes of the three kernels."""

    forward: Tiles
    dq: Tiles
    dkv: Tiles


class Options(NamedTuple):
    """What a call fixes at compilation. `dtype` is the output's."""

    sizes: Sizes
    scale: float
    dtype: Any
    interpret: bool


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    causal: bool,
    segment_ids: jax.Array | None,
    scale: float,
    logit_scale: jax.Array | None,
    sizes: Sizes | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.attention`. `sizes` None chooses by width, dtype and the GPU's shared memory."""
    length, keys = q_BTHD.shape[1], k_BSKD.shape[1]
    last = jnp.arange(length) if causal else jnp.full(length, keys - 1)
    last_bT = last[None] if segment_ids is None else jnp.where(segment_ids >= 0, last, -1)
    attend_to = partial(attend, q_BTHD, k_BSKD, v_BSKD, last_bT, ids_BT=segment_ids, key_ids_BS=segment_ids)
    return attend_to(scale=scale, logit_scale=logit_scale, sizes=sizes, interpret=interpret)[0]


def cached_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_positions_BT: jax.Array,
    *,
    scale: float,
    logit_scale: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """See `api.cached_attention`: the kernel for a few queries, or the one for sequences."""
    if gpu_decode.fits(q_BTHD, k_BSKD):
        decode = partial(gpu_decode.cached_attention, interpret=interpret)
        return decode(q_BTHD, k_BSKD, v_BSKD, q_positions_BT, scale=scale, logit_scale=logit_scale)
    last_BT = jnp.minimum(q_positions_BT, k_BSKD.shape[1] - 1)
    attend_to = partial(attend, q_BTHD, k_BSKD, v_BSKD, last_BT)
    return attend_to(scale=scale, logit_scale=logit_scale, interpret=interpret)[0]


def attend(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    last_bT: jax.Array,
    *,
    ids_BT: jax.Array | None = None,
    key_ids_BS: jax.Array | None = None,
    scale: float,
    logit_scale: jax.Array | None = None,
    dtype: Any = None,
    sizes: Sizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention to a block of keys, differentiable in q, k and v from both outputs: what a ring merges.

    Args:
      q_BTHD, k_BSKD, v_BSKD: float32 or bfloat16, K dividing H, D up to 256.
      last_bT: int32 [1 or B, T], the last of these keys that a query may see: below 0 for none, at most S-1.
      ids_BT, key_ids_BS: int32, both or neither; a query sees keys of its own id only.
      scale: multiplies the scores, as `logit_scale` ([T] or [B,T]) does, in float32; the latter gets no gradient.
      dtype: of the output; None is v's.

    Returns:
      o_BTHD, and the logarithm of the sum of the exponentials of the scores, float32 [B,H,T]; 0 and -1e30 for a query
      that sees nothing.
    """
    if logit_scale is not None:
        logit_scale = jax.lax.stop_gradient(jnp.atleast_2d(logit_scale.astype(jnp.float32)))
    if ids_BT is not None and key_ids_BS is not None:
        ids_BT, key_ids_BS = ids_BT.astype(jnp.int32), key_ids_BS.astype(jnp.int32)
    sizes = sizes or sizes_for(max(q_BTHD.shape[3], v_BSKD.shape[3]), jnp.result_type(q_BTHD, k_BSKD, v_BSKD))
    options = Options(sizes, scale, jnp.dtype(dtype or v_BSKD.dtype), interpret)
    return _jitted(options, q_BTHD, k_BSKD, v_BSKD, last_bT.astype(jnp.int32), ids_BT, key_ids_BS, logit_scale)


def sizes_for(width: int, dtype: Any) -> Sizes:
    """Block sizes that fit the GPU's shared memory: 227 KB a program on Hopper, 163 KB on A100, 99 KB on others."""
    width, capability = gpu_blocks.columns(width), compat.compute_capability()
    if jnp.dtype(dtype).itemsize > 2:
        keys = 32 if width <= 128 else 16
        return Sizes(*(Tiles(64 if n == 0 or width <= 64 else 32, keys, 4, 2) for n in range(3)))
    if capability[0] in (9, 10):
        if width <= 128:
            return Sizes(Tiles(128, 64, 4 if width <= 64 else 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2))
        return Sizes(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2))
    large = capability == (8, 0)
    if width <= 128:
        return Sizes(Tiles(128 if large else 64, 64, 4, 2), Tiles(64, 64 if large else 32, 4, 2), Tiles(32, 64, 4, 2))
    return Sizes(Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 2))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, q, k, v, last_bT, ids_BT, key_ids_BS, factor_bT):
    return _forward(options, q, k, v, last_bT, ids_BT, key_ids_BS, factor_bT)[0]


def _forward(options: Options, *inputs):
    o, log_sum = forward(options.sizes.forward, options.scale, options.dtype, options.interpret, *inputs)
    return (o, log_sum), (*inputs, o, log_sum)


def _backward(options: Options, residuals, cotangents):
    tiles = options.sizes.dq, options.sizes.dkv
    return *backward(tiles, options.scale, options.interpret, residuals, *cotangents), None, None, None, None


_attend.defvjp(_forward, _backward)
_jitted = jax.jit(_attend, static_argnums=0)


def _refuses(*, q_BTHD, k_BSKD, v_BSKD, **call) -> str | None:
    return gpu_blocks.refusal(q_BTHD, k_BSKD, v_BSKD)


BACKEND = Backend("gpu", attention, _refuses)
CACHED_BACKEND = Backend("gpu", cached_attention, _refuses)
