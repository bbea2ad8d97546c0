"""The public functions of softmax attention."""

from __future__ import annotations

import jax

from kernels_pallas import dispatch
from kernels_pallas.attention import cudnn, gpu, reference, tpu, xla

BACKENDS = dispatch.table(tpu.BACKEND, cudnn.BACKEND, gpu.BACKEND, xla.BACKEND, reference.BACKEND)
CACHED_BACKENDS = dispatch.table(tpu.CACHED_BACKEND, gpu.CACHED_BACKEND, xla.CACHED_BACKEND, reference.CACHED_BACKEND)


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    logit_scale_T: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """`softmax(scale * q k^T) v`, scores, softmax and accumulators in float32.

    Differentiable in q, k and v. Query head h reads key head h // (H/K). Matrix products take operands in the input
    dtype.

    Args:
      q_BTHD: floating.
      k_BSKD, v_BSKD: floating; K divides H. S may differ from T only if `causal` is False and there are no segments.
      causal: a query sees keys up to its own place.
      segment_ids: int32 [B,T]; tokens see equal ids only. Negative ids are padding: never seen, output zero.
      scale: None is D**-0.5.
      logit_scale_T: float32 [T] or [B,T], multiplies q in float32 (HypeNet's s_t); gets no gradient.
      backend: a name in `BACKENDS`, or "auto".

    Returns:
      o_BTHD in v's dtype; zero where a query sees nothing.

    Raises:
      ValueError: shapes disagree, or no backend (or not the named one) supports the call.
    """
    _check(q_BTHD, k_BSKD, v_BSKD)
    batch, length, keys = *q_BTHD.shape[:2], k_BSKD.shape[1]
    if length != keys and (causal or segment_ids is not None):
        raise ValueError(f"q has {length} tokens and k {keys}, but causal or segmented attention needs as many")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids have shape {segment_ids.shape} but must be {(batch, length)} (B,T)")
    if logit_scale_T is not None and logit_scale_T.shape not in ((length,), (batch, length)):
        raise ValueError(f"logit_scale_T has shape {logit_scale_T.shape} but must be {(length,)} or {(batch, length)}")
    call = {"q_BTHD": q_BTHD, "k_BSKD": k_BSKD, "v_BSKD": v_BSKD, "causal": causal, "segment_ids": segment_ids}
    chosen = dispatch.choose("attention", BACKENDS, backend, call)
    return chosen.function(
        q_BTHD,
        k_BSKD,
        v_BSKD,
        causal=causal,
        segment_ids=segment_ids,
        scale=q_BTHD.shape[-1] ** -0.5 if scale is None else float(scale),
        logit_scale=logit_scale_T,
    )


def cached_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_positions_BT: jax.Array,
    *,
    scale: float | None = None,
    logit_scale_BT: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Attention of new tokens to a preallocated cache that already holds their own keys and values.

    The work grows with the largest position, not with the size of the cache.

    Args:
      q_BTHD: floating; T is 1 in decoding, the chunk's length in prefill.
      k_BSKD, v_BSKD: the cache; slots beyond a query's position may hold anything finite.
      q_positions_BT: int32; a query at position p sees slots 0..p, a query at -1 is padding and gives zeros.
      scale, logit_scale_BT, backend: as in `attention`.

    Returns:
      o_BTHD in v's dtype.

    Raises:
      ValueError: shapes disagree, or no backend (or not the named one) supports the call.
    """
    _check(q_BTHD, k_BSKD, v_BSKD)
    places = q_BTHD.shape[:2]
    if q_positions_BT.shape != places:
        raise ValueError(f"q_positions_BT has shape {q_positions_BT.shape} but must be {places}")
    if logit_scale_BT is not None and logit_scale_BT.shape not in (places, places[1:]):
        raise ValueError(f"logit_scale_BT has shape {logit_scale_BT.shape} but must be {places}")
    call = {"q_BTHD": q_BTHD, "k_BSKD": k_BSKD, "v_BSKD": v_BSKD}
    return dispatch.choose("cached_attention", CACHED_BACKENDS, backend, call).function(
        q_BTHD,
        k_BSKD,
        v_BSKD,
        q_positions_BT,
        scale=q_BTHD.shape[-1] ** -0.5 if scale is None else float(scale),
        logit_scale=logit_scale_BT,
    )


def _check(q_BTHD: jax.Array, k_BSKD: jax.Array, v_BSKD: jax.Array) -> None:
    q, k, v = q_BTHD.shape, k_BSKD.shape, v_BSKD.shape
    if len(q) != 4 or len(k) != 4 or k[:3] != v[:3] or q[0] != k[0] or q[3] != k[3]:
        raise ValueError(f"q, k, v have shapes {q}, {k}, {v} but must be [B,T,H,D], [B,S,K,D], [B,S,K,D]")
    if min(*q, *k, *v) < 1:
        raise ValueError(f"q, k, v have shapes {q}, {k}, {v} but no axis may be empty")
    if q[2] % k[2]:
        raise ValueError(f"q has {q[2]} heads and k {k[2]}, but the heads of k must divide those of q")
