"""Softmax attention in blocks with an online softmax, in plain XLA: any platform, memory linear in the length.

Causality, padding and the cache's positions all come down to one number a query: the last key it may see (`last`, -1
for none). A block of queries visits key blocks up to the largest `last` within it, and the backward visits, for a block
of keys, the query blocks from the first that sees it: what lies above the diagonal is skipped, not masked.

Axes: N query blocks, R rows of a block (the group's heads times its queries), J keys of a key block.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.dispatch import Backend

QUERY_BLOCK = 256
KEY_BLOCK = 256
NOTHING = -1e30  # below every score, and finite: a row that sees nothing must not make inf - inf


class Blocks(NamedTuple):
    queries: int
    keys: int


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    causal: bool,
    segment_ids: jax.Array | None,
    scale: float,
    logit_scale: jax.Array | None,
    blocks: tuple[int, int] | None = None,
) -> jax.Array:
    """See `api.attention`. `blocks` are the numbers of queries and keys a block; None chooses."""
    length, keys = q_BTHD.shape[1], k_BSKD.shape[1]
    last = jnp.arange(length) if causal else jnp.full(length, keys - 1)
    last_bT = last[None] if segment_ids is None else jnp.where(segment_ids >= 0, last, -1)
    return _attend(blocks, scale, q_BTHD, k_BSKD, v_BSKD, last_bT, segment_ids, logit_scale)


@partial(jax.jit, static_argnames=("scale", "dtype", "blocks"))
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
    blocks: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `block.attend_block`."""
    chosen = _blocks(blocks, q_BTHD.shape[1], k_BSKD.shape[1])
    q, k, v = _scaled(q_BTHD, k_BSKD, v_BSKD, scale, logit_scale)
    last_bT = _last_of_real(last_bT, segment_ids)
    o, log_sum = _sweep(chosen, dtype, q, k, v, last_bT, segment_ids, key_segment_ids)
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    return _from_rows(o, length, group), _from_rows(log_sum[..., None], length, group)[..., 0]


@partial(jax.jit, static_argnames=("scale", "blocks"))
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
    blocks: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `block.block_gradients`."""
    chosen = _blocks(blocks, q_BTHD.shape[1], k_BSKD.shape[1])
    q, k, v = _scaled(q_BTHD, k_BSKD, v_BSKD, scale, logit_scale)
    last_bT, group = _last_of_real(last_bT, segment_ids), q.shape[2] // k.shape[2]
    do, log_sum, inner = (
        _rows(chosen.queries, x, group) for x in (do_BTHD, log_sum_BTH[..., None], inner_BTH[..., None])
    )
    rows = do.astype(q.dtype), log_sum[..., 0], inner[..., 0]
    dq, dk, dv = _gradients(chosen, q, k, v, last_bT, segment_ids, key_segment_ids, *rows)
    return dq * _factor(scale, logit_scale), dk, dv


def cached_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_positions_BT: jax.Array,
    *,
    scale: float,
    logit_scale: jax.Array | None,
    blocks: tuple[int, int] | None = None,
) -> jax.Array:
    """See `api.cached_attention`."""
    return _attend(blocks, scale, q_BTHD, k_BSKD, v_BSKD, q_positions_BT, None, logit_scale)


@partial(jax.jit, static_argnums=(0, 1))
def _attend(blocks, scale, q, k, v, last_bT, ids_BT, logit_scale):
    chosen, dtype = _blocks(blocks, q.shape[1], k.shape[1]), v.dtype
    return _softmax(chosen, *_scaled(q, k, v, scale, logit_scale), last_bT, ids_BT).astype(dtype)


def _blocks(blocks: tuple[int, int] | None, length: int, keys: int) -> Blocks:
    queries_block, keys_block = blocks or (QUERY_BLOCK, KEY_BLOCK)
    return Blocks(min(queries_block, length), min(keys_block, keys))


def _scaled(q, k, v, scale: float, logit_scale):
    """q times its factors, k and v, all in the dtype of the products."""
    dtype = jnp.result_type(q, k, v)
    q = (q.astype(jnp.float32) * _factor(scale, logit_scale)).astype(dtype)
    return q, k.astype(dtype), v.astype(dtype)


def _factor(scale: float, logit_scale):
    if logit_scale is None:
        return scale
    return scale * jax.lax.stop_gradient(logit_scale.astype(jnp.float32))[..., None, None]


def _last_of_real(last_bT, ids_BT):
    return last_bT if ids_BT is None else jnp.where(ids_BT >= 0, last_bT, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(blocks: Blocks, q, k, v, last_bT, ids_BT):
    return _forward(blocks, q, k, v, last_bT, ids_BT)[0]


def _forward(blocks: Blocks, q, k, v, last_bT, ids_BT):
    o, log_sum = _sweep(blocks, v.dtype, q, k, v, last_bT, ids_BT, ids_BT)
    return _from_rows(o, q.shape[1], q.shape[2] // k.shape[2]), (q, k, v, last_bT, ids_BT, o, log_sum)


def _sweep(blocks: Blocks, o_dtype, q, k, v, last_bT, ids_BT, key_ids_BS):
    """o [N,b,K,R,D] and the float32 log-sum-exp [N,b,K,R]."""
    group = q.shape[2] // k.shape[2]
    dot = _product(q.dtype)
    last_NbT = _tokens(blocks.queries, last_bT)
    ids_NBT = None if ids_BT is None else _tokens(blocks.queries, ids_BT)

    def query_block(x):
        q_BKRD, last, ids = x

        def key_block(j, carry):
            top, total, o = carry
            k_BJKD, v_BJKD, seen = _key_block(blocks, j, k, v, last, ids, key_ids_BS, group)
            scores = jnp.where(seen, dot("bkrd,bjkd->bkrj", q_BKRD, k_BJKD), NOTHING)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            total = shrink * total + jnp.sum(weights, axis=-1)
            o = shrink[..., None] * o + dot("bkrj,bjkd->bkrd", weights.astype(q.dtype), v_BJKD)
            return new_top, total, o

        zeros = jnp.zeros_like(q_BKRD[..., 0], jnp.float32)
        start = (zeros + NOTHING, zeros, jnp.zeros_like(q_BKRD[..., :1] * v[:, :1, :].swapaxes(1, 2), jnp.float32))
        top, total, o = jax.lax.fori_loop(0, jnp.max(last) // blocks.keys + 1, key_block, start)
        total = jnp.where(total > 0, total, 1.0)
        return (o / total[..., None]).astype(o_dtype), top + jnp.log(total)

    return _each(query_block, (_rows(blocks.queries, q, group), last_NbT, ids_NBT))


def _backward(blocks: Blocks, residuals, do):
    q, k, v, last_bT, ids_BT, o, log_sum = residuals
    do_NBKRD = _rows(blocks.queries, do, q.shape[2] // k.shape[2])
    inner_NBKR = jnp.sum(do_NBKRD.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
    gradients = _gradients(blocks, q, k, v, last_bT, ids_BT, ids_BT, do_NBKRD, log_sum, inner_NBKR)
    return *(x.astype(q.dtype) for x in gradients), None, None


def _gradients(blocks: Blocks, q, k, v, last_bT, ids_BT, key_ids_BS, do_NBKRD, log_sum, inner_NBKR):
    """dq (of the scaled q), dk and dv, float32."""
    group, dtype = q.shape[2] // k.shape[2], q.dtype
    dot = _product(dtype)
    last_NbT = _tokens(blocks.queries, last_bT)
    ids_NBT = None if ids_BT is None else _tokens(blocks.queries, ids_BT)
    q_NBKRD = _rows(blocks.queries, q, group)
    reach_N = jnp.max(last_NbT, axis=(1, 2))

    def key_block(j, carry):
        dq, dk, dv = carry

        def query_block(n, carry):
            dq, dk_BJKD, dv_BJKD = carry
            q_n, do_n, log_sum_n, inner_n, last, ids = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, n, keepdims=False),
                (q_NBKRD, do_NBKRD, log_sum, inner_NBKR, last_NbT, ids_NBT),
            )
            k_j, v_j, seen = _key_block(blocks, j, k, v, last, ids, key_ids_BS, group)
            weights = jnp.where(seen, jnp.exp(dot("bkrd,bjkd->bkrj", q_n, k_j) - log_sum_n[..., None]), 0.0)
            dweights = dot("bkrd,bjkd->bkrj", do_n, v_j)
            dscores = (weights * (dweights - inner_n[..., None])).astype(dtype)
            dv_BJKD += dot("bkrj,bkrd->bjkd", weights.astype(dtype), do_n)
            dk_BJKD += dot("bkrj,bkrd->bjkd", dscores, q_n)
            dq_n = jax.lax.dynamic_index_in_dim(dq, n, keepdims=False) + dot("bkrj,bjkd->bkrd", dscores, k_j)
            return jax.lax.dynamic_update_index_in_dim(dq, dq_n, n, 0), dk_BJKD, dv_BJKD

        sees = reach_N >= j * blocks.keys
        first = jnp.where(jnp.any(sees), jnp.argmax(sees), len(reach_N))
        start = _start(blocks, j, k)
        at = [jax.lax.dynamic_slice_in_dim(x, start, blocks.keys, axis=1) for x in (dk, dv)]
        dq, *at = jax.lax.fori_loop(first, len(reach_N), query_block, (dq, *at))
        dk, dv = (jax.lax.dynamic_update_slice_in_dim(x, y, start, axis=1) for x, y in zip((dk, dv), at, strict=True))
        return dq, dk, dv

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (q_NBKRD, k, v))
    dq, dk, dv = jax.lax.fori_loop(0, -(-k.shape[1] // blocks.keys), key_block, zeros)
    return _from_rows(dq, q.shape[1], group), dk, dv


_softmax.defvjp(_forward, _backward)


def _product(dtype):
    # Without HIGHEST, accelerators would round float32 operands to bfloat16 or TF32.
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)


def _start(blocks: Blocks, j, k) -> jax.Array:
    # The last block of keys reaches back into the one before it, so that no cache is ever copied to be padded.
    return jnp.minimum(j * blocks.keys, k.shape[1] - blocks.keys)


def _key_block(blocks: Blocks, j, k, v, last_bT, ids_NT, ids_BS, group):
    """Keys and values of block j, and which rows of a query block see them: bool [b,1,R,J]."""
    start = _start(blocks, j, k)
    k, v = (jax.lax.dynamic_slice_in_dim(x, start, blocks.keys, axis=1) for x in (k, v))
    places = start + jnp.arange(blocks.keys)
    seen_bTJ = (places <= last_bT[..., None]) & (places >= j * blocks.keys)
    if ids_BS is not None:
        ids_BJ = jax.lax.dynamic_slice_in_dim(ids_BS, start, blocks.keys, axis=1)
        seen_bTJ = seen_bTJ & (ids_NT[..., None] == ids_BJ[:, None, :])
    return k, v, jnp.tile(seen_bTJ[:, None], (1, 1, group, 1))


def _each(function, xs):
    """`function` over the leading axis, without a loop where there is only one."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.map(function, xs)
    return jax.tree.map(lambda y: y[None], function(jax.tree.map(lambda x: x[0], xs)))


def _tokens(block: int, x_bT: jax.Array) -> jax.Array:
    """[b,T] -> [N,b,block], the tail filled up with -1 (padding, and seeing nothing)."""
    x = jnp.pad(x_bT, ((0, 0), (0, -x_bT.shape[1] % block)), constant_values=-1)
    return x.reshape(x.shape[0], -1, block).swapaxes(0, 1)


def _rows(block: int, x_BTHD: jax.Array, group: int) -> jax.Array:
    """[B,T,H,D] -> [N,B,K,R,D]."""
    batch, length, heads, width = x_BTHD.shape
    x = jnp.pad(x_BTHD, ((0, 0), (0, -length % block), (0, 0), (0, 0)))
    x = x.reshape(batch, -1, block, heads // group, group, width).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(*x.shape[:3], group * block, width)


def _from_rows(x_NBKRD: jax.Array, length: int, group: int) -> jax.Array:
    blocks, batch, kv_heads, rows, width = x_NBKRD.shape
    x = x_NBKRD.reshape(blocks, batch, kv_heads, group, rows // group, width).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, -1, kv_heads * group, width)[:, :length]


def _refuses(*, q_BTHD, k_BSKD, v_BSKD, **call) -> str | None:
    for name, x in (("q", q_BTHD), ("k", k_BSKD), ("v", v_BSKD)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}, and it accumulates in float32 from float32 or bfloat16 only"
    return None


BACKEND = Backend("xla", attention, _refuses)
CACHED_BACKEND = Backend("xla", cached_attention, _refuses)
