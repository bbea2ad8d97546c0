"""Softmax attention on TPU: the kernels' calling sides, gradients, and what they refuse.

`attend_block` is attention of some queries to some keys of a longer sequence, the piece that ring and all-gather
attention over a sharded sequence are made of; `attention` is that of a sequence to itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import compat
from kernels_pallas.attention import xla
from kernels_pallas.attention.tpu_backward import backward
from kernels_pallas.attention.tpu_blocks import (
    SMEM_BYTES,
    Blocks,
    Rows,
    Tables,
    largest_block,
    padded,
    rows,
    table_bytes,
    tables,
)
from kernels_pallas.attention.tpu_decode import MOST_ROWS, decode
from kernels_pallas.attention.tpu_forward import forward
from kernels_pallas.attention.tpu_inner import inner_products
from kernels_pallas.dispatch import Backend

# Of one head in bfloat16, by static schedules (docs/decisions/0013): more queries pay on v6e only, and in the forward.
FORWARD_BLOCKS, BACKWARD_BLOCKS = Blocks(1024, 1024, 512), Blocks(512, 1024, 512)
WIDTHS = (32, 64, 128, 256)


class Plan(NamedTuple):
    """What is known at trace time. `dtype` is that of o, `gradient_dtype` that of dq, dk and dv."""

    forward: Blocks
    backward: Blocks
    dtype: Any
    gradient_dtype: Any
    interpret: Any


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    causal: bool,
    segment_ids: jax.Array | None,
    scale: float,
    logit_scale: jax.Array | None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `api.attention`. `blocks` None chooses."""
    dtype, length, keys = jnp.result_type(q_BTHD, k_BSKD, v_BSKD), q_BTHD.shape[1], k_BSKD.shape[1]
    last_T = jnp.minimum(jnp.arange(length), keys - 1) if causal else jnp.full(length, keys - 1)
    o_BTHD, _ = attend_block(
        q_BTHD.astype(dtype),
        k_BSKD.astype(dtype),
        v_BSKD.astype(dtype),
        last_T[None],
        segment_ids=segment_ids,
        key_segment_ids=segment_ids,
        scale=scale,
        logit_scale=logit_scale,
        dtype=v_BSKD.dtype,
        blocks=blocks,
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
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `block.attend_block`; here also differentiable in q, k and v, with cotangents of both results."""
    plan = _plan(q_BTHD, k_BSKD, blocks, dtype, q_BTHD.dtype, interpret)
    tokens = _tokens(q_BTHD, k_BSKD, last_bT, segment_ids, key_segment_ids, scale, logit_scale)
    return _attend(plan, q_BTHD, k_BSKD, v_BSKD, *tokens)


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
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `block.block_gradients`."""
    plan = _plan(q_BTHD, k_BSKD, blocks, jnp.float32, jnp.float32, interpret)
    tokens = _tokens(q_BTHD, k_BSKD, last_bT, segment_ids, key_segment_ids, scale, logit_scale)
    return _gradients(plan, q_BTHD, k_BSKD, v_BSKD, do_BTHD, log_sum_BTH, inner_BTH, *_described(plan, *tokens))


def _tokens(
    q_BTHD, k_BSKD, last_bT, segment_ids, key_segment_ids, scale, logit_scale
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What each query sees: its last key, its id and its factor, [B,T], and the keys' ids [B,S]."""
    (batch, length), keys = q_BTHD.shape[:2], k_BSKD.shape[1]
    last_BT = jnp.broadcast_to(last_bT.astype(jnp.int32), (batch, length))
    if segment_ids is None or key_segment_ids is None:
        segment_ids, key_segment_ids = jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, keys), jnp.int32)
    return last_BT, segment_ids, _factor(q_BTHD, scale, logit_scale), key_segment_ids


def _factor(q_BTHD, scale, logit_scale) -> jax.Array:
    """What each query's scores are multiplied by, float32 [B,T]."""
    factor = jnp.full((), scale, jnp.float32)
    if logit_scale is not None:
        factor = factor * jax.lax.stop_gradient(logit_scale.astype(jnp.float32))
    return jnp.broadcast_to(factor, q_BTHD.shape[:2])


def _plan(q_BTHD, k_BSKD, blocks, dtype, gradient_dtype, interpret) -> Plan:
    forward_blocks = blocks or _blocks(q_BTHD, k_BSKD, FORWARD_BLOCKS)
    backward_blocks = blocks or _blocks(q_BTHD, k_BSKD, BACKWARD_BLOCKS)
    return Plan(forward_blocks, backward_blocks, jnp.dtype(dtype), jnp.dtype(gradient_dtype), interpret)


def _blocks(q_BTHD, k_BSKD, most: Blocks) -> Blocks:
    # The widest heads, and float32 (several passes, twice the bytes), take half of the block.
    halves = 1 + (q_BTHD.shape[3] > 128 or q_BTHD.dtype == jnp.float32)
    keys = largest_block(k_BSKD.shape[1], most.keys // halves)
    return Blocks(largest_block(q_BTHD.shape[1], most.queries // halves), keys, min(keys, most.part))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, last_BT, ids_BT, factor_BT, key_ids_BS):
    return _attend_forward(plan, q, k, v, last_BT, ids_BT, factor_BT, key_ids_BS)[0]


def _attend_forward(plan: Plan, q, k, v, *tokens):
    blocks = plan.forward
    described = _described(plan, *tokens)
    arrays = _by_head(q, blocks.queries), _by_head(k, blocks.keys), _by_head(v, blocks.keys)
    o_BHTE, log_sum_BH1T = forward(blocks, plan.interpret, *arrays, *described, plan.dtype)
    o_BTHE = _by_token(o_BHTE, q.shape[1])
    log_sum_BTH = log_sum_BH1T[:, :, 0, : q.shape[1]].swapaxes(1, 2)
    return (o_BTHE, log_sum_BTH), (q, k, v, described, o_BTHE, log_sum_BTH)


def _attend_backward(plan: Plan, residuals, cotangents):
    q, k, v, described, o_BTHE, log_sum_BTH = residuals
    do_BTHE, dlog_sum_BTH = cotangents
    block = plan.backward.queries
    inner_BH1T = inner_products(plan.interpret, _by_head(o_BTHE, block), _by_head(do_BTHE, block), block)
    inner_BTH = _by_token(inner_BH1T[:, :, 0], q.shape[1]) - dlog_sum_BTH
    gradients = _gradients(plan, q, k, v, do_BTHE, log_sum_BTH, inner_BTH, *described)
    return *(d.astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True)), None, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _gradients(
    plan: Plan, q, k, v, do_BTHE, log_sum_BTH, inner_BTH, rows: Rows, tables: Tables
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What this block of keys adds to dq, and its dk and dv, in `plan.gradient_dtype`.

    `log_sum` and `inner`, float32 [B,T,H], are those of the whole sequence: `inner` is sum(o * do) over the head's
    width (less the cotangent of the log-sum-exp, where it has one).
    """
    blocks = plan.backward
    arrays = _by_head(q, blocks.queries), _by_head(k, blocks.keys), _by_head(v, blocks.keys)
    do_BHTE = _by_head(do_BTHE.astype(q.dtype), blocks.queries)
    log_sum_BH1T, inner_BH1T = (
        padded(x.swapaxes(1, 2)[:, :, None], 3, blocks.queries) for x in (log_sum_BTH, inner_BTH)
    )
    dq, dk, dv = backward(
        blocks, plan.interpret, *arrays, do_BHTE, log_sum_BH1T, inner_BH1T, rows, tables, plan.gradient_dtype
    )
    return _by_token(dq, q.shape[1]), _by_token(dk, k.shape[1]), _by_token(dv, k.shape[1])


def _described(plan: Plan, last_BT, ids_BT, factor_BT, key_ids_BS) -> tuple[Rows, Tables]:
    """For both kernels: their lengths are padded alike, and the backward's blocks are the smaller."""
    described = rows(last_BT, ids_BT, factor_BT, key_ids_BS, plan.forward)
    return described, tables(described, plan.backward)


def _by_head(x_BTHD: jax.Array, block: int) -> jax.Array:
    """[B,H,T,D], whole blocks. XLA gives the projection's result this layout, so that nothing moves."""
    return padded(x_BTHD.swapaxes(1, 2), 2, block)


def _by_token(x_BHTD: jax.Array, length: int) -> jax.Array:
    return x_BHTD[:, :, :length].swapaxes(1, 2)


def refuses(*, q_BTHD, k_BSKD, v_BSKD, **options) -> str | None:
    """Why `attention` does not support a call, or None."""
    if compat.platform() != "tpu":
        return f"it runs on TPU and this is {compat.platform()}"
    for name, x in (("q", q_BTHD), ("k", k_BSKD), ("v", v_BSKD)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}, and it takes float32 and bfloat16"
        if x.shape[3] not in WIDTHS:
            return f"the heads of {name} are {x.shape[3]} wide, and it takes {', '.join(map(str, WIDTHS))}"
    plan = _plan(q_BTHD, k_BSKD, None, q_BTHD.dtype, q_BTHD.dtype, False)
    counts = [-(-x.shape[1] // grain) for x, grain in ((q_BTHD, plan.backward.queries), (k_BSKD, plan.backward.part))]
    if table_bytes(q_BTHD.shape[0], *counts) > SMEM_BYTES:
        return f"{q_BTHD.shape[0]} rows of {k_BSKD.shape[1]} keys have more blocks than scalar memory holds tables for"
    return compat.undivided()


def cached_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_positions_BT: jax.Array,
    *,
    scale: float,
    logit_scale: jax.Array | None,
    block: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `api.cached_attention`.

    A few queries read each row's cache once, as far as it is filled. More (a chunk of a prompt) go to the kernel of
    `attention`, for which the cache's heads are set apart first: a copy of all of it.
    """
    dtype = jnp.result_type(q_BTHD, k_BSKD, v_BSKD)
    q, k, v = (x.astype(dtype) for x in (q_BTHD, k_BSKD, v_BSKD))
    if q.shape[1] * q.shape[2] <= MOST_ROWS:
        factor_BT = _factor(q, scale, logit_scale)
        return _decode(interpret, block, q, k, v, q_positions_BT, factor_BT).astype(v_BSKD.dtype)
    last_BT = jnp.minimum(q_positions_BT, k.shape[1] - 1)
    options: dict[str, Any] = {"scale": scale, "logit_scale": logit_scale, "interpret": interpret}
    return attend_block(q, k, v, last_BT, dtype=v_BSKD.dtype, **options)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode(interpret, block, q, k, v, positions_BT, factor_BT):
    return decode(q, k, v, positions_BT, factor_BT, interpret, block)[0].astype(v.dtype)


def attend_cache(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    last_BT: jax.Array,
    *,
    scale: float,
    logit_scale: jax.Array | None = None,
    dtype: Any,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `block.attend_cache`."""
    if q_BTHD.shape[1] * q_BTHD.shape[2] > MOST_ROWS:
        options: dict[str, Any] = {"scale": scale, "logit_scale": logit_scale, "interpret": interpret}
        return attend_block(q_BTHD, k_BSKD, v_BSKD, last_BT, dtype=dtype, **options)
    factor_BT = _factor(q_BTHD, scale, logit_scale)
    o, log_sum = decode(q_BTHD, k_BSKD, v_BSKD, last_BT, factor_BT, interpret)
    return o.astype(dtype), log_sum


def _decode_forward(interpret, block, *inputs):
    return _decode(interpret, block, *inputs), inputs


def _decode_backward(interpret, block, inputs, do):
    # Nobody trains through a cache; the portable backward will do.
    q, k, v, positions_BT, factor_BT = inputs

    def portable(q, k, v):
        return xla.cached_attention(q, k, v, positions_BT, scale=1.0, logit_scale=factor_BT)

    return *jax.vjp(portable, q, k, v)[1](do), None, None


_decode.defvjp(_decode_forward, _decode_backward)


BACKEND = Backend("tpu", attention, refuses)
CACHED_BACKEND = Backend("tpu", cached_attention, refuses)
