"""Attention of some queries to some keys of a longer sequence: what ring and all-gather attention are made of.

What a query sees is told by the last of these keys that it may see and, with documents, by the ids. So queries and keys
may lie anywhere in the sequence as long as what a query may see of the keys comes first among them.
"""

from __future__ import annotations

import jax
from jax.typing import DTypeLike

from kernels_pallas import dispatch
from kernels_pallas.attention import gpu, tpu, xla
from kernels_pallas.dispatch import Backend


def _tpu(q_BTHD, k_BSKD, v_BSKD, last_bT, **options):
    return tpu.attend_block(q_BTHD, k_BSKD, v_BSKD, last_bT=last_bT, **options)


def _gpu(q_BTHD, k_BSKD, v_BSKD, last_bT, **options):
    return gpu.attend_block(q_BTHD, k_BSKD, v_BSKD, last_bT=last_bT, **options)


BLOCK_BACKENDS = dispatch.table(
    Backend("tpu", _tpu, tpu.BACKEND.refuses),
    Backend("gpu", _gpu, gpu.BACKEND.refuses),
    Backend("xla", xla.attend_block, xla.BACKEND.refuses),
)
CACHE_BACKENDS = dispatch.table(
    Backend("tpu", tpu.attend_cache, tpu.CACHED_BACKEND.refuses),
    Backend("gpu", gpu.attend_cache, gpu.CACHED_BACKEND.refuses),
    Backend("xla", xla.attend_cache, xla.CACHED_BACKEND.refuses),
)
GRADIENT_BACKENDS = dispatch.table(
    Backend("tpu", tpu.gradients_of_block, tpu.BACKEND.refuses),
    Backend("gpu", gpu.gradients_of_block, gpu.BACKEND.refuses),
    Backend("xla", xla.block_gradients, xla.BACKEND.refuses),
)


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
    dtype: DTypeLike,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Attention to these keys alone, and what it takes to add others. Not to be differentiated: see `block_gradients`.

    Args:
      q_BTHD, k_BSKD, v_BSKD: of one dtype, float32 or bfloat16; K divides H.
      last_bT: int32 [B or 1,T], the last of these keys that a query may see, -1 for none.
      segment_ids, key_segment_ids: int32 [B,T] and [B,S], both or neither; as in `api.attention`.
      logit_scale: float32 [T] or [B,T], of these queries.
      dtype: of o.
      backend: a name in `BLOCK_BACKENDS`, or "auto".

    Returns:
      o_BTHD and the natural log-sum-exp of the scores, float32 [B,T,H]: zero and about -1e30 where nothing is seen.

    Raises:
      ValueError: no backend (or not the named one) supports the call.
    """
    call = {"q_BTHD": q_BTHD, "k_BSKD": k_BSKD, "v_BSKD": v_BSKD}
    masks = {"segment_ids": segment_ids, "key_segment_ids": key_segment_ids, "logit_scale": logit_scale}
    chosen = dispatch.choose("attend_block", BLOCK_BACKENDS, backend, call)
    return chosen.function(q_BTHD, k_BSKD, v_BSKD, last_bT, scale=scale, dtype=dtype, **masks)


def attend_cache(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    last_BT: jax.Array,
    *,
    scale: float,
    logit_scale: jax.Array | None = None,
    dtype: DTypeLike,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`attend_block` for a cache: fast for one or a few queries of each row, and the slots beyond `last` are not read.

    Args, returns and raises: as in `attend_block`; slots that no query sees may hold anything finite.
    """
    call = {"q_BTHD": q_BTHD, "k_BSKD": k_BSKD, "v_BSKD": v_BSKD}
    chosen = dispatch.choose("attend_cache", CACHE_BACKENDS, backend, call)
    return chosen.function(q_BTHD, k_BSKD, v_BSKD, last_BT, scale=scale, logit_scale=logit_scale, dtype=dtype)


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
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to dq, and their dk and dv from these queries, all float32.

    Args:
      do_BTHD: the cotangent of the whole attention's output.
      log_sum_BTH: float32, of all keys that the queries see, here and elsewhere.
      inner_BTH: float32, the whole output's sum(o * do) over the width of a head.
      the others: as in `attend_block`.
    """
    call = {"q_BTHD": q_BTHD, "k_BSKD": k_BSKD, "v_BSKD": v_BSKD}
    masks = {"segment_ids": segment_ids, "key_segment_ids": key_segment_ids, "logit_scale": logit_scale}
    chosen = dispatch.choose("block_gradients", GRADIENT_BACKENDS, backend, call)
    rows = do_BTHD, log_sum_BTH, inner_BTH, last_bT
    return chosen.function(q_BTHD, k_BSKD, v_BSKD, *rows, scale=scale, **masks)
