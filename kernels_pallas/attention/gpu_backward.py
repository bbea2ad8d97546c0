"""Flash attention backward on a GPU (Pallas, Triton lowering): weights are computed anew from the log-sum-exp.

Two kernels, so that no sum is shared between programs and results repeat to the bit: one goes over the keys for a block
of queries (dq), the other over the queries of all heads of the group for a block of keys (dk, dv). Axes: R queries of a
block, J keys of a block; the second kernel keeps its scores transposed, keys first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import compat
from kernels_pallas.attention import gpu_blocks as blocks
from kernels_pallas.attention.gpu_blocks import LOG2_E, NOTHING, Tiles

UNSEEN = 1e30  # the log-sum-exp of a query that sees nothing: it makes every weight zero


def backward(
    tiles: tuple[Tiles, Tiles],
    scale: float,
    interpret: bool,
    q,
    k,
    v,
    last_bT,
    ids_BT,
    key_ids_BS,
    factor_bT,
    do_BTHD,
    log_sum_BHT,
    inner_BHT,
    dtypes: tuple[Any, Any, Any],
):
    """dq, dk, dv in `dtypes`. `tiles` of the dq and of the dk, dv kernel.

    `log_sum` is of all keys that the queries see, here or elsewhere, and `inner` is sum(o * do) over the width of a
    head, less the cotangent of the log-sum-exp.
    """
    log_sum_BHT = jnp.where(log_sum_BHT <= NOTHING / 2, UNSEEN, log_sum_BHT * LOG2_E)
    optional = [x for x in (ids_BT, key_ids_BS, factor_bT) if x is not None]
    inputs = (last_bT, q, k, v, do_BTHD.astype(jnp.result_type(q, k, v)), log_sum_BHT, inner_BHT, *optional)
    segmented = ids_BT is not None
    (batch, length, heads), (slots, kv_heads) = q.shape[:3], k.shape[1:3]
    by_query, by_key = tiles
    (dq,) = compat.triton_call(
        partial(_dq_kernel, tiles=by_query, scale=scale, segmented=segmented, interpret=interpret),
        grid=(heads, pl.cdiv(length, by_query.queries), batch),
        out_shape=[jax.ShapeDtypeStruct(q.shape, dtypes[0])],
        num_warps=by_query.num_warps,
        num_stages=by_query.num_stages,
        interpret=interpret,
        name="attention_dq",
    )(blocks.spans(last_bT, ids_BT, key_ids_BS, slots, by_query).of_queries, *inputs)
    dk, dv = compat.triton_call(
        partial(_dkv_kernel, tiles=by_key, scale=scale, segmented=segmented, interpret=interpret),
        grid=(kv_heads, pl.cdiv(slots, by_key.keys), batch),
        out_shape=[jax.ShapeDtypeStruct(x.shape, dtype) for x, dtype in zip((k, v), dtypes[1:], strict=True)],
        num_warps=by_key.num_warps,
        num_stages=by_key.num_stages,
        interpret=interpret,
        name="attention_dkv",
    )(blocks.spans(last_bT, ids_BT, key_ids_BS, slots, by_key).of_keys, *inputs)
    return dq, dk, dv


class _Inputs:
    """What both kernels read of queries and keys."""

    def __init__(self, refs, outputs: int, tiles: Tiles, scale: float, segmented: bool, interpret: bool):
        self.last, self.q, self.k, self.v, self.do, self.log_sum, self.inner, *optional = refs[:-outputs]
        self.outputs = refs[-outputs:]
        self.ids: Any = optional[0] if segmented else None
        self.key_ids: Any = optional[1] if segmented else None
        self.factor = optional[-1] if len(optional) % 2 else None
        self.tiles, self.scale = tiles, scale
        self.dtype = jnp.result_type(self.q, self.k, self.v)
        self.dot = blocks.product(self.dtype, interpret)
        self.length, self.heads = self.q.shape[1:3]
        self.slots, self.kv_heads = self.k.shape[1:3]
        self.group = self.heads // self.kv_heads
        self.row = pl.program_id(2)

    def queries(self, ref, start, head):
        end = self.length if self.length % self.tiles.queries else None
        return blocks.load_rows(ref, self.row, start, self.tiles.queries, head, end).astype(self.dtype)

    def keys(self, ref, start, head):
        end = self.slots if self.slots % self.tiles.keys else None
        return blocks.load_rows(ref, self.row, start, self.tiles.keys, head, end).astype(self.dtype)

    def of_queries(self, ref, start, head, other):
        return blocks.load_tokens(ref, (self.row, head), start, self.tiles.queries, self.length, other)

    def of_pair(self, i, kv_head):
        """The block, counted from 0, and the query head of the i-th pair: a group takes turns at a block."""
        n = jax.lax.div(i, jnp.full_like(i, self.group))
        return n, kv_head * self.group + i - n * self.group

    def factors(self, start):
        """What scores are multiplied with: [R], or a scalar."""
        if self.factor is None:
            return jnp.full((), self.scale, jnp.float32)
        at = (jnp.minimum(self.row, self.factor.shape[0] - 1),)
        return self.scale * blocks.load_tokens(self.factor, at, start, self.tiles.queries, self.length, 0.0)

    def sees(self, start, key, across):
        """Which queries see which keys; `across` turns [R] and [J] into what broadcasts to the scores."""
        at, size = (jnp.minimum(self.row, self.last.shape[0] - 1),), self.tiles.queries
        last_R = blocks.load_tokens(self.last, at, start, size, self.length, -1)
        last, keys = across(last_R, key + jnp.arange(self.tiles.keys))
        if self.ids is None:
            return keys <= last
        ids_R = blocks.load_tokens(self.ids, (self.row,), start, size, self.length, -1)
        ids_J = blocks.load_tokens(self.key_ids, (self.row,), key, self.tiles.keys, self.slots, -1)
        ids, key_ids = across(ids_R, ids_J)
        return (keys <= last) & (ids == key_ids)


def _dq_kernel(spans_ref, *refs, tiles: Tiles, scale, segmented: bool, interpret: bool):
    rows = _Inputs(refs, 1, tiles, scale, segmented, interpret)
    head, place, row = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1), pl.program_id(2)
    kv_head, start = head // rows.group, place * tiles.queries
    q_RD, do_RD = rows.queries(rows.q, start, head), rows.queries(rows.do, start, head)
    log_sum_R, inner_R = rows.of_queries(rows.log_sum, start, head, UNSEEN), rows.of_queries(rows.inner, start, head, 0)
    factor_R1 = jnp.broadcast_to(rows.factors(start), (tiles.queries,))[:, None]

    def visit(j, dq_RD, masked: bool):
        key = j * tiles.keys
        k_JD, v_JD = rows.keys(rows.k, key, kv_head), rows.keys(rows.v, key, kv_head)
        weights_RJ = blocks.exp2(rows.dot(q_RD, k_JD, 1, 1), factor_R1 * LOG2_E, -log_sum_R[:, None], interpret)
        if masked:
            sees_RJ = rows.sees(start, key, lambda r, j: (r[:, None], j[None, :]))
            weights_RJ = jnp.where(sees_RJ, weights_RJ, 0.0)
        dscores_RJ = weights_RJ * (rows.dot(do_RD, v_JD, 1, 1) - inner_R[:, None])
        return dq_RD + rows.dot(dscores_RJ.astype(rows.dtype), k_JD, 1, 0)

    first, masked_count, whole, whole_end = blocks.span(spans_ref, row, place)
    dq_RD = jnp.zeros(q_RD.shape, jnp.float32)
    dq_RD = jax.lax.fori_loop(whole, whole_end, partial(visit, masked=False), dq_RD)

    def visit_masked(i, dq_RD):
        return visit(blocks.masked_place(i, first, whole, whole_end), dq_RD, masked=True)

    dq_RD = jax.lax.fori_loop(0, masked_count, visit_masked, dq_RD)
    end = rows.length if rows.length % tiles.queries else None
    blocks.store_rows(rows.outputs[0], row, start, tiles.queries, head, dq_RD * factor_R1, end)


def _dkv_kernel(spans_ref, *refs, tiles: Tiles, scale, segmented: bool, interpret: bool):
    rows = _Inputs(refs, 2, tiles, scale, segmented, interpret)
    kv_head, place, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    key = place * tiles.keys
    k_JD, v_JD = rows.keys(rows.k, key, kv_head), rows.keys(rows.v, key, kv_head)

    def visit(n, head, carry, masked: bool):
        dk_JD, dv_JD = carry
        start = n * tiles.queries
        q_RD, do_RD = rows.queries(rows.q, start, head), rows.queries(rows.do, start, head)
        log_sum_R = rows.of_queries(rows.log_sum, start, head, UNSEEN)
        inner_R = rows.of_queries(rows.inner, start, head, 0)
        factor = rows.factors(start)
        factor_1R = jnp.broadcast_to(factor, (tiles.queries,))[None, :]
        weights_JR = blocks.exp2(rows.dot(k_JD, q_RD, 1, 1), factor_1R * LOG2_E, -log_sum_R[None, :], interpret)
        if masked:
            seen_JR = rows.sees(start, key, lambda r, j: (r[None, :], j[:, None]))
            weights_JR = jnp.where(seen_JR, weights_JR, 0.0)
        dv_JD += rows.dot(weights_JR.astype(rows.dtype), do_RD, 1, 0)
        dscores_JR = weights_JR * (rows.dot(v_JD, do_RD, 1, 1) - inner_R[None, :])
        if rows.factor is not None:
            dscores_JR *= factor_1R
        return dk_JD + rows.dot(dscores_JR.astype(rows.dtype), q_RD, 1, 0), dv_JD

    first, masked_count, whole, whole_end = blocks.span(spans_ref, row, place)

    def visit_whole(i, carry):
        n, head = rows.of_pair(i, kv_head)
        return visit(whole + n, head, carry, masked=False)

    def visit_masked(i, carry):
        n, head = rows.of_pair(i, kv_head)
        return visit(blocks.masked_place(n, first, whole, whole_end), head, carry, masked=True)

    carry = jnp.zeros(k_JD.shape, jnp.float32), jnp.zeros(v_JD.shape, jnp.float32)
    carry = jax.lax.fori_loop(0, (whole_end - whole) * rows.group, visit_whole, carry)
    dk_JD, dv_JD = jax.lax.fori_loop(0, masked_count * rows.group, visit_masked, carry)
    if rows.factor is None:
        dk_JD *= scale
    end = rows.slots if rows.slots % tiles.keys else None
    for ref, value in zip(rows.outputs, (dk_JD, dv_JD), strict=True):
        blocks.store_rows(ref, row, key, tiles.keys, kv_head, value, end)
