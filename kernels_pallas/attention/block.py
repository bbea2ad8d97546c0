"""Attention of some queries to some keys of a longer sequence: what ring and all-gather attention are made of.

What a query sees is told by the last of these keys that it may see and, with documents, by the ids. So queries and keys
may lie anywhere in the sequence as long as what a query may see of the keys comes first among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NotRequired, TypedDict, Unpack

import jax
from jax.typing import DTypeLike

from kernels_pallas import dispatch
from kernels_pallas.attention import gpu, tpu, xla
from kernels_pallas.dispatch import Backend

BLOCK_BACKENDS = dispatch.table(
    Backend("tpu", tpu.attend_block, tpu.BACKEND.refuses),
    Backend("gpu", gpu.attend_block, gpu.BACKEND.refuses),
    Backend("xla", xla.attend_block, xla.BACKEND.refuses),
)
CACHE_BACKENDS = dispatch.table(
    Backend("tpu", tpu.attend_cache, tpu.CACHED_BACKEND.refuses),
    Backend("gpu", gpu.attend_cache, gpu.CACHED_BACKEND.refuses),
    Backend("xla", xla.attend_block, xla.CACHED_BACKEND.refuses),
)
GRADIENT_BACKENDS = dispatch.table(
    Backend("tpu", tpu.block_gradients, tpu.BACKEND.refuses),
    Backend("gpu", gpu.block_gradients, gpu.BACKEND.refuses),
    Backend("xla", xla.block_gradients, xla.BACKEND.refuses),
)


class Scales(TypedDict):
    """What scores are multiplied by. logit_scale: float32 [T] or [B,T], of these queries; None is 1."""

    scale: float
    logit_scale: NotRequired[jax.Array | None]


class Masks(Scales):
    """Also who sees whom: int32 [B,T] and [B,S], both or neither; as in `api.attention`."""

    segment_ids: NotRequired[jax.Array | None]
    key_segment_ids: NotRequired[jax.Array | None]


def attend_block(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    last_bT: jax.Array,
    *,
    dtype: DTypeLike,
    backend: str = "auto",
    **masks: Unpack[Masks],
) -> tuple[jax.Array, jax.Array]:
    """Attention to these keys alone, and what it takes to add others. Not to be differentiated: see `block_gradients`.

    Args:
      q_BTHD, k_BSKD, v_BSKD: of one dtype, float32 or bfloat16; K divides H.
      last_bT: int32 [B or 1,T], the last of these keys that a query may see, -1 for none.
      dtype: of o.
      backend: a name in `BLOCK_BACKENDS`, or "auto".
      masks: see `Masks`.

    Returns:
      o_BTHD and the natural log-sum-exp of the scores, float32 [B,T,H]: zero and about -1e30 where nothing is seen.

    Raises:
      ValueError: no backend (or not the named one) supports the call.
    """
    function = _chosen("attend_block", BLOCK_BACKENDS, backend, q_BTHD, k_BSKD, v_BSKD)
    return function(q_BTHD, k_BSKD, v_BSKD, last_bT, dtype=dtype, **masks)


def attend_cache(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    last_BT: jax.Array,
    *,
    dtype: DTypeLike,
    backend: str = "auto",
    **scales: Unpack[Scales],
) -> tuple[jax.Array, jax.Array]:
    """`attend_block` for a cache: fast for one or a few queries of each row, and the slots beyond `last` are not read.

    Args, returns and raises: as in `attend_block`; slots that no query sees may hold anything finite.
    """
    function = _chosen("attend_cache", CACHE_BACKENDS, backend, q_BTHD, k_BSKD, v_BSKD)
    return function(q_BTHD, k_BSKD, v_BSKD, last_BT, dtype=dtype, **scales)


def block_gradients(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    do_BTHD: jax.Array,
    log_sum_BTH: jax.Array,
    inner_BTH: jax.Array,
    last_bT: jax.Array,
    *,
    backend: str = "auto",
    **masks: Unpack[Masks],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to dq, and their dk and dv from these queries, all float32.

    Args:
      do_BTHD: the cotangent of the whole attention's output.
      log_sum_BTH: float32, of all keys that the queries see, here and elsewhere.
      inner_BTH: float32, the whole output's sum(o * do) over the width of a head.
      the others: as in `attend_block`.
    """
    function = _chosen("block_gradients", GRADIENT_BACKENDS, backend, q_BTHD, k_BSKD, v_BSKD)
    return function(q_BTHD, k_BSKD, v_BSKD, do_BTHD, log_sum_BTH, inner_BTH, last_bT, **masks)


def _chosen(name: str, backends, backend: str, q_BTHD, k_BSKD, v_BSKD) -> Callable:
    call = {"q_BTHD": q_BTHD, "k_BSKD": k_BSKD, "v_BSKD": v_BSKD}
    return dispatch.choose(name, backends, backend, call).function
