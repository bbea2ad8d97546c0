"""Causal softmax attention over a sequence in zigzag order, by two ways to the other shards' keys.

"ring": keys and values go round the shards, and partial results are merged by their log-sum-exps; a shard never holds
more than two parts of keys. "gather": every shard has all keys at once, and again in the backward pass. In both the
kernel skips what no query may see: each shard visits half of every other shard's pairs, whichever shard it is.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hypenet_jax.parallel.sequence.order import in_natural_order, places
from kernels_pallas.attention import attend_block, block_gradients

EXCHANGES = ("auto", "ring", "gather")
# "auto" gathers while one layer's keys and values of the whole sequence are no more bytes on a device than this. The
# backward holds them and their float32 gradients, three times as much in bfloat16. On two H200s it is 1 to 2% faster
# than the ring at any length: see decision 17.
GATHERED_BYTES = 2**28
NOTHING = -1e30  # the kernels' log-sum-exp of no keys
LANES = 128


class Call(NamedTuple):
    """What is known at trace time."""

    exchange: str
    axis_name: str
    scale: float


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    axis_name: str,
    exchange: str = "auto",
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    logit_scale_T: jax.Array | None = None,
) -> jax.Array:
    """`kernels_pallas.attention.attention`, causal, of the whole sequence in zigzag order over mesh axis `axis_name`.

    Args:
      q_BTHD, k_BSKD, v_BSKD, segment_ids: this shard's T/n tokens, an even number.
      exchange: "ring", "gather", or "auto": gather up to `GATHERED_BYTES`, else ring.
      scale: None is D**-0.5.
      logit_scale_T: float32 [T/n] or [B,T/n], of this shard's queries.

    Returns:
      o_BTHD of this shard's tokens, in v's dtype.

    Raises:
      ValueError: an unknown exchange.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange is {exchange!r} but must be one of {', '.join(EXCHANGES)}")
    if exchange == "auto":
        exchange = chosen(k_BSKD, v_BSKD, jax.lax.axis_size(axis_name))
    call = Call(exchange, axis_name, q_BTHD.shape[-1] ** -0.5 if scale is None else float(scale))
    return _attention(call, q_BTHD, k_BSKD, v_BSKD, segment_ids, logit_scale_T)


def chosen(k_BSKD: jax.Array, v_BSKD: jax.Array, shards: int) -> str:
    """What "auto" means for one shard's keys and values."""
    gathered = shards * sum(x.size * x.dtype.itemsize for x in (k_BSKD, v_BSKD))
    return "gather" if gathered <= GATHERED_BYTES else "ring"


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: Call, q, k, v, ids, factor):
    return _forward(call, q, k, v, ids, factor)[0]


def _forward(call: Call, q, k, v, ids, factor):
    attend = {"ring": _ring, "gather": _gather}[call.exchange]
    o, log_sum = attend(call, q, k, v, ids, factor)
    o = o.astype(v.dtype)
    return o, (q, k, v, ids, factor, o, log_sum)


def _backward(call: Call, residuals, do):
    q, k, v, ids, factor, o, log_sum = residuals
    inner = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    gradients = {"ring": _ring_gradients, "gather": _gather_gradients}[call.exchange]
    dqkv = gradients(call, q, k, v, ids, factor, do, log_sum, inner)
    return *(d.astype(x.dtype) for d, x in zip(dqkv, (q, k, v), strict=True)), None, None


_attention.defvjp(_forward, _backward)


def _gather(call: Call, q, k, v, ids, factor):
    all_k, all_v, masks = _gathered(call, q, k, v, ids, factor)
    return attend_block(q, all_k, all_v, dtype=v.dtype, **masks)


def _gather_gradients(call: Call, q, k, v, ids, factor, do, log_sum, inner):
    all_k, all_v, masks = _gathered(call, q, k, v, ids, factor)
    dq, *dkv = block_gradients(q, all_k, all_v, do, log_sum, inner, **masks)
    shards = jax.lax.axis_size(call.axis_name)

    def home(d_BSKD):
        """Each shard's half-blocks, summed over what all shards found for them."""
        first, second = jnp.split(d_BSKD.reshape(d_BSKD.shape[0], 2 * shards, -1, *d_BSKD.shape[2:]), 2, axis=1)
        by_shard = jnp.stack([first, second[:, ::-1]], axis=2)  # [B, n, 2, T/2n, K, D]
        # As rows: of more axes the TPU compiler may choose a layout in which no shard's part lies in one piece, and
        # then sums everything everywhere.
        rows = jnp.moveaxis(by_shard, 1, 0).reshape(-1, k.shape[-1])
        return jax.lax.psum_scatter(rows, call.axis_name, scatter_dimension=0, tiled=True).reshape(k.shape)

    return dq, *(home(d) for d in dkv)


def _gathered(call: Call, q, k, v, ids, factor):
    """Keys and values of the whole sequence in natural order, and what the kernels must know of them."""

    def whole(x_bT):
        halves = x_bT.reshape(x_bT.shape[0], 2, -1, *x_bT.shape[2:])
        blocks = in_natural_order(jax.lax.all_gather(halves, call.axis_name))  # [2n, b, T/2n, ...]
        return jnp.moveaxis(blocks, 0, 1).reshape(x_bT.shape[0], -1, *x_bT.shape[2:])

    key_ids = None if ids is None else whole(ids)
    return whole(k), whole(v), _masks(call, _own_places(call, q), ids, key_ids, factor)


def _ring(call: Call, q, k, v, ids, factor):
    own, shards = _own_places(call, q), jax.lax.axis_size(call.axis_name)

    def visit(step, keys, sums):
        k, v, key_ids = keys
        masks = _masks(call, _last_seen(own, _source(call, step), shards), ids, key_ids, factor)
        o, log_sum = attend_block(q, k, v, dtype=jnp.float32, **masks)
        return _merged(sums, (_by_lanes(o), _by_lanes(log_sum)))

    def body(step, carry):
        keys, sums = carry
        # Asked for before the products, so that the keys may travel meanwhile.
        return _passed_on(call, keys), visit(step, keys, sums)

    zeros = _by_lanes(jnp.zeros_like(q, jnp.float32))
    keys, sums = jax.lax.fori_loop(0, shards - 1, body, ((k, v, ids), (zeros, zeros[..., 0] + NOTHING)))
    o, log_sum = visit(shards - 1, keys, sums)
    return _by_token(o), _by_token(log_sum)


def _ring_gradients(call: Call, q, k, v, ids, factor, do, log_sum, inner):
    own, shards = _own_places(call, q), jax.lax.axis_size(call.axis_name)

    def visit(step, keys, dq, dkv):
        k, v, key_ids = keys
        masks = _masks(call, _last_seen(own, _source(call, step), shards), ids, key_ids, factor)
        found = block_gradients(q, k, v, do, log_sum, inner, **masks)
        added = jax.tree.map(jnp.add, (dq, *dkv), found)
        return added[0], _passed_on(call, added[1:])

    def body(step, carry):
        keys, dq, dkv = carry
        return _passed_on(call, keys), *visit(step, keys, dq, dkv)

    dq, *dkv = (jnp.zeros_like(x, jnp.float32) for x in (q, k, v))
    keys, dq, dkv = jax.lax.fori_loop(0, shards - 1, body, ((k, v, ids), dq, tuple(dkv)))
    dq, dkv = visit(shards - 1, keys, dq, dkv)  # and the gradients are home
    return dq, *dkv


def _merged(sums, part):
    """The attention to both parts' keys; all arrays by lanes."""
    (o_a, log_sum_a), (o_b, log_sum_b) = sums, part
    log_sum = jnp.logaddexp(log_sum_a, log_sum_b)
    share_a, share_b = (jnp.exp(x - log_sum)[..., None] for x in (log_sum_a, log_sum_b))
    return share_a * o_a + share_b * o_b, log_sum


def _by_lanes(x_BTH: jax.Array) -> jax.Array:
    """[B,T,H,...] -> [B,H,N,lanes,...], as a TPU has it in memory: its compiler takes 20 s a merge of anything else."""
    lanes = math.gcd(x_BTH.shape[1], LANES)
    x_BHT = x_BTH.swapaxes(1, 2)
    return jax.lax.optimization_barrier(x_BHT.reshape(*x_BHT.shape[:2], -1, lanes, *x_BHT.shape[3:]))


def _by_token(x_BHNL: jax.Array) -> jax.Array:
    """The inverse of `_by_lanes`."""
    return x_BHNL.reshape(*x_BHNL.shape[:2], -1, *x_BHNL.shape[4:]).swapaxes(1, 2)


def _passed_on(call: Call, tree):
    shards = jax.lax.axis_size(call.axis_name)
    to_next = [(shard, (shard + 1) % shards) for shard in range(shards)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, call.axis_name, to_next), tree)


def _source(call: Call, step):
    """The shard whose keys are here after so many steps."""
    return (jax.lax.axis_index(call.axis_name) - step) % jax.lax.axis_size(call.axis_name)


def _own_places(call: Call, q):
    return places(jax.lax.axis_index(call.axis_name), jax.lax.axis_size(call.axis_name), q.shape[1])


def _last_seen(own_T, shard, shards: int):
    """The last of a shard's keys at or before each place of `own_T`, -1 for none: in zigzag order too they ascend."""
    half = own_T.shape[0] // 2
    starts = shard * half, (2 * shards - 1 - shard) * half
    return sum(jnp.clip(own_T - start + 1, 0, half) for start in starts) - 1


def _masks(call: Call, last_T, ids, key_ids, factor) -> dict:
    masks = {"last_bT": last_T[None], "segment_ids": ids, "key_segment_ids": key_ids}
    return masks | {"scale": call.scale, "logit_scale": factor}
