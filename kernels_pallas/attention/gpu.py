"""Softmax attention on a GPU (Pallas, Triton lowering): the backend, its block sizes, and its derivative."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import compat
from kernels_pallas.attention import gpu_blocks, gpu_decode, xla
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
    last_T = jnp.minimum(jnp.arange(length), keys - 1) if causal else jnp.full(length, keys - 1)
    o_BTHD, _ = attend_block(
        q_BTHD,
        k_BSKD,
        v_BSKD,
        last_T[None],
        segment_ids=segment_ids,
        key_segment_ids=segment_ids,
        scale=scale,
        logit_scale=logit_scale,
        dtype=v_BSKD.dtype,
        sizes=sizes,
        interpret=interpret,
    )
    return o_BTHD


def attend_block(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    last_bT: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    scale: float,
    logit_scale: jax.Array | None = None,
    dtype: Any,
    sizes: Sizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `block.attend_block`; here also differentiable in q, k and v, with cotangents of both results."""
    options = _options(q_BTHD, k_BSKD, v_BSKD, scale, dtype, sizes, interpret)
    tokens = _last_of_real(last_bT, segment_ids), segment_ids, key_segment_ids, _factor(logit_scale)
    o_BTHD, log_sum_BHT = _attend(options, q_BTHD, k_BSKD, v_BSKD, *tokens)
    return o_BTHD, log_sum_BHT.swapaxes(1, 2)


def block_gradients(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    do_BTHD: jax.Array,
    log_sum_BTH: jax.Array,
    inner_BTH: jax.Array,
    last_bT: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    scale: float,
    logit_scale: jax.Array | None = None,
    sizes: Sizes | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `block.block_gradients`."""
    options = _options(q_BTHD, k_BSKD, v_BSKD, scale, jnp.float32, sizes, interpret)
    tokens = _last_of_real(last_bT, segment_ids), segment_ids, key_segment_ids, _factor(logit_scale)
    rows = do_BTHD, log_sum_BTH.swapaxes(1, 2), inner_BTH.swapaxes(1, 2)
    return _gradients(options, q_BTHD, k_BSKD, v_BSKD, *tokens, *rows, (options.dtype,) * 3)


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
    arrays = q_BTHD, k_BSKD, v_BSKD
    if gpu_decode.fits(q_BTHD, k_BSKD):
        return _decode(scale, interpret, *arrays, q_positions_BT, logit_scale)
    last_BT = jnp.minimum(q_positions_BT, k_BSKD.shape[1] - 1)
    options: dict[str, Any] = {"scale": scale, "logit_scale": logit_scale, "interpret": interpret}
    return attend_block(*arrays, last_BT, dtype=v_BSKD.dtype, **options)[0]


def attend_cache(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    last_BT: jax.Array,
    *,
    scale: float,
    logit_scale: jax.Array | None = None,
    dtype: Any,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `block.attend_cache`."""
    arrays = q_BTHD, k_BSKD, v_BSKD
    options: dict[str, Any] = {"scale": scale, "logit_scale": logit_scale, "dtype": dtype}
    if gpu_decode.fits(q_BTHD, k_BSKD):
        return gpu_decode.attend(*arrays, last_BT, interpret=interpret, **options)
    return attend_block(*arrays, last_BT, interpret=interpret, **options)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode(scale: float, interpret: bool, q, k, v, positions, logit_scale):
    options = {"scale": scale, "logit_scale": logit_scale, "interpret": interpret}
    return gpu_decode.cached_attention(q, k, v, positions, **options)


def _decode_forward(scale: float, interpret: bool, *inputs):
    return _decode(scale, interpret, *inputs), inputs


def _decode_backward(scale: float, interpret: bool, inputs, do):
    *arrays, positions, logit_scale = inputs  # rarely asked for: XLA's will do
    options = {"scale": scale, "logit_scale": logit_scale}
    _, pull = jax.vjp(lambda q, k, v: xla.cached_attention(q, k, v, positions, **options), *arrays)
    return *pull(do), None, None


_decode.defvjp(_decode_forward, _decode_backward)


def _options(q, k, v, scale, dtype, sizes, interpret) -> Options:
    sizes = sizes or sizes_for(max(q.shape[3], v.shape[3]), jnp.result_type(q, k, v))
    return Options(sizes, scale, jnp.dtype(dtype), interpret)


def _last_of_real(last_bT: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Padding sees nothing."""
    last_bT = last_bT.astype(jnp.int32)
    return last_bT if segment_ids is None else jnp.where(segment_ids >= 0, last_bT, -1)


def _factor(logit_scale: jax.Array | None) -> jax.Array | None:
    if logit_scale is None:
        return None
    return jax.lax.stop_gradient(jnp.atleast_2d(logit_scale.astype(jnp.float32)))


def sizes_for(width: int, dtype: Any) -> Sizes:
    """Block sizes that fit the GPU's shared memory: 227 KB a program on Hopper, 163 KB on A100, 99 KB on others."""
    width, capability = gpu_blocks.columns(width), compat.compute_capability()
    if jnp.dtype(dtype).itemsize > 2:  # three TF32 products keep both halves of their operands in registers
        if width <= 64:
            return Sizes(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2))
        if width <= 128:
            return Sizes(Tiles(32, 32, 8, 2), Tiles(16, 32, 4, 2), Tiles(16, 32, 8, 2))
        return Sizes(*[Tiles(16, 16, 4, 2)] * 3)
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
    *inputs, o, log_sum_BHT = residuals
    do_BTHD, dlog_sum_BHT = cotangents
    inner_BTH = jnp.sum(do_BTHD.astype(jnp.float32) * o.astype(jnp.float32), axis=3)
    inner_BHT = inner_BTH.swapaxes(1, 2) - dlog_sum_BHT
    dtypes = tuple(x.dtype for x in inputs[:3])
    return *_gradients(options, *inputs, do_BTHD, log_sum_BHT, inner_BHT, dtypes), None, None, None, None


def _gradients(options: Options, *inputs):
    return backward((options.sizes.dq, options.sizes.dkv), options.scale, options.interpret, *inputs)


_attend.defvjp(_forward, _backward)


def _refuses(*, q_BTHD, k_BSKD, v_BSKD, **call) -> str | None:
    return gpu_blocks.refusal(q_BTHD, k_BSKD, v_BSKD)


BACKEND = Backend("gpu", attention, _refuses)
CACHED_BACKEND = Backend("gpu", cached_attention, _refuses)
