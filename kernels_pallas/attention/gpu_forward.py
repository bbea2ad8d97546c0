"""Flash attention forward on a GPU (Pallas, Triton lowering; FlashAttention-2, arXiv 2307.08691).

A program takes one block of queries of one head and goes over the keys it sees, in the arrays' own [B,T,H,D] layout:
first the blocks of keys that every query sees whole, then the few that need a mask. Programs with the most work start
first. Axes: R queries of a block, J keys of a block.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import compat
from kernels_pallas.attention import gpu_blocks as blocks
from kernels_pallas.attention.gpu_blocks import LOG2_E, NOTHING, Tiles


def forward(tiles: Tiles, scale: float, dtype, interpret: bool, q, k, v, last_bT, ids_BT, key_ids_BS, factor_bT):
    """o_BTHD in `dtype`, and the natural logarithm of the sum of exponentials [B,H,T] (NOTHING where none is seen)."""
    (batch, length, heads), v_width = q.shape[:3], v.shape[3]
    optional = [x for x in (ids_BT, key_ids_BS, factor_bT) if x is not None]
    return compat.triton_call(
        partial(_kernel, tiles=tiles, scale=scale, segmented=ids_BT is not None, interpret=interpret),
        grid=(heads, pl.cdiv(length, tiles.queries), batch),
        out_shape=[
            jax.ShapeDtypeStruct((batch, length, heads, v_width), dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        interpret=interpret,
        name="attention_forward",
    )(blocks.spans(last_bT, ids_BT, key_ids_BS, k.shape[1], tiles).of_queries, last_bT, q, k, v, *optional)


def _kernel(spans_ref, last_ref, q_ref, k_ref, v_ref, *refs, tiles: Tiles, scale, segmented: bool, interpret: bool):
    *optional, o_ref, log_sum_ref = refs
    ids_ref, key_ids_ref = optional[:2] if segmented else (None, None)
    factor_ref = optional[-1] if len(optional) % 2 else None
    (_, length, heads, _), (_, slots, kv_heads, v_width) = q_ref.shape, v_ref.shape
    head, place, row = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1), pl.program_id(2)
    kv_head, start = head // (heads // kv_heads), place * tiles.queries
    dtype = jnp.result_type(q_ref, k_ref, v_ref)
    dot = blocks.product(dtype, interpret)
    row_end = None if length % tiles.queries == 0 else length

    q_RD = blocks.load_rows(q_ref, row, start, tiles.queries, head, row_end).astype(dtype)
    last_at = (jnp.minimum(row, last_ref.shape[0] - 1),)
    last_R = blocks.load_tokens(last_ref, last_at, start, tiles.queries, length, -1)
    if factor_ref is None:
        factor = jnp.full((), scale * LOG2_E, jnp.float32)
    else:
        factor_at = (jnp.minimum(row, factor_ref.shape[0] - 1),)
        factor = scale * LOG2_E * blocks.load_tokens(factor_ref, factor_at, start, tiles.queries, length, 0.0)
    # Scores are scaled in float32, after their running maximum is taken: factors must not be negative.
    if factor_ref is not None:
        q_RD = jnp.where(factor < 0, -1.0, 1.0).astype(dtype)[:, None] * q_RD
        factor = jnp.abs(factor)
    elif scale < 0:
        q_RD, factor = -q_RD, -factor
    factor_R1 = jnp.broadcast_to(factor, (tiles.queries,))[:, None]

    def visit(j, carry, masked: bool):
        top_R, total_R, o_RD = carry
        key = j * tiles.keys
        end = slots if masked and slots % tiles.keys else None
        k_JD = blocks.load_rows(k_ref, row, key, tiles.keys, kv_head, end).astype(dtype)
        scores_RJ = dot(q_RD, k_JD, 1, 1)
        if masked:
            sees_RJ = (key + jnp.arange(tiles.keys))[None, :] <= last_R[:, None]
            if segmented:
                ids_R = blocks.load_tokens(ids_ref, (row,), start, tiles.queries, length, -1)
                ids_J = blocks.load_tokens(key_ids_ref, (row,), key, tiles.keys, slots, -1)
                sees_RJ &= ids_R[:, None] == ids_J[None, :]
            scores_RJ = jnp.where(sees_RJ, scores_RJ, NOTHING)
        new_top_R = jnp.maximum(top_R, jnp.max(scores_RJ, axis=1))
        weights_RJ = blocks.exp2(scores_RJ, factor_R1, -(new_top_R[:, None] * factor_R1), interpret)
        if masked:
            weights_RJ = jnp.where(sees_RJ, weights_RJ, 0.0)
        shrink_R = blocks.exp2(top_R - new_top_R, factor, 0.0, interpret)
        v_JD = blocks.load_rows(v_ref, row, key, tiles.keys, kv_head, end).astype(dtype)
        o_RD = o_RD * shrink_R[:, None] + dot(weights_RJ.astype(dtype), v_JD, 1, 0)
        return new_top_R, total_R * shrink_R + jnp.sum(weights_RJ, axis=1), o_RD

    first, masked_count, whole, whole_end = blocks.span(spans_ref, row, place)
    carry = (
        jnp.full(tiles.queries, NOTHING, jnp.float32),
        jnp.zeros(tiles.queries, jnp.float32),
        jnp.zeros((tiles.queries, blocks.columns(v_width)), jnp.float32),
    )
    carry = jax.lax.fori_loop(whole, whole_end, partial(visit, masked=False), carry)

    def visit_masked(i, carry):
        return visit(blocks.masked_place(i, first, whole, whole_end), carry, masked=True)

    top_R, total_R, o_RD = jax.lax.fori_loop(0, masked_count, visit_masked, carry)

    saw_R = (last_R >= 0) & (total_R > 0)
    total_R = jnp.where(saw_R, total_R, 1.0)
    o_RD = jnp.where(saw_R[:, None], o_RD / total_R[:, None], 0.0)
    blocks.store_rows(o_ref, row, start, tiles.queries, head, o_RD, row_end)
    log_sum_R = jnp.where(saw_R, (top_R * factor + jnp.log2(total_R)) / LOG2_E, NOTHING)
    there = None if row_end is None else start + jnp.arange(tiles.queries) < row_end
    blocks.store(log_sum_ref.at[row, head, pl.ds(start, tiles.queries)], log_sum_R, there)
