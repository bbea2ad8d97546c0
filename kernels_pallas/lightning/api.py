"""The public functions of linear attention with scalar decay."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.typing import ArrayLike

from kernels_pallas import dispatch
from kernels_pallas.lightning import gpu, jax_triton, reference, tpu, xla

BACKENDS = dispatch.table(tpu.BACKEND, gpu.BACKEND, jax_triton.BACKEND, xla.BACKEND, reference.BACKEND)


def slopes(num_heads: int) -> np.ndarray:
    """The decay rates of the heads: `s_h = 2^(-8h/H)`, h = 1..H, float32 [H]; a token decays the state by `exp(-s_h)`.

    When H is no power of two: the slopes of the power of two below, then every second slope of twice that series,
    unsorted (the ALiBi rule, as in the official code).

    Raises:
      ValueError: `num_heads` is below 1.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads} but must be at least 1")
    below = 2 ** math.floor(math.log2(num_heads))
    series = [2.0 ** (-8.0 * h / below) for h in range(1, below + 1)]
    doubled = [2.0 ** (-8.0 * h / (2 * below)) for h in range(1, 2 * below + 1)]
    return np.asarray(series + doubled[0::2][: num_heads - below], np.float32)


def lightning_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    slopes_H: ArrayLike,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    precision: str = "default",
    short_memory: float | None = None,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Linear attention with a fixed decay a head (HypeNet, arXiv 2601.22156, section 3).

    `S_t = exp(-s_h) S_{t-1} + k_t^T v_t` and `o_t = scale * q_t S_t`: the current token is not decayed.
    Differentiable in q, k, v and the initial state, with cotangents for both results; the slopes get no gradient.

    Args:
      q_BTHK, k_BTHK, v_BTHV: floating; as many key and value heads as query heads (the caller repeats them).
      slopes_H: float32, each >= 0, in units of 1/token.
      scale: factor of the output; None is K**-0.5.
      initial_state: float32 [B,H,K,V], belonging to the document of the first non-padding token; None is zeros.
      segment_ids: int32 [B,T]. The state resets where the id changes between consecutive non-padding tokens; negative
        ids are padding, which reads nothing, writes nothing and neither decays nor resets the state; it may hold
        anything finite. None is one document a row.
      precision: "default" multiplies matrices in the input dtype with float32 accumulation; "high" in float32.
      short_memory: where a backend cuts a row into segments that run at once, it may start each from the tokens just
        before it instead of the whole row: per head, those that have decayed to no less than 2^-short_memory. What is
        left out of a state is below 2^-short_memory of the same tokens undecayed; 24 or more is below float32's
        rounding of keys and values of one size. None is exact, and so are backends that cut nothing, and documents.
      backend: a name in `BACKENDS`, or "auto".

    Returns:
      o_BTHV in v's dtype (zero at padding) and the float32 state [B,H,K,V] after the last non-padding token.

    Raises:
      ValueError: shapes disagree, or no backend (or not the named one) supports the call.
    """
    _check(q_BTHK, k_BTHK, v_BTHV, slopes_H, initial_state, segment_ids)
    _check_precision(precision)
    if short_memory is not None and not short_memory > 0:
        raise ValueError(f"short_memory is {short_memory} but must be a positive number of bits")
    call = {"q_BTHK": q_BTHK, "k_BTHK": k_BTHK, "v_BTHV": v_BTHV}
    chosen = dispatch.choose("lightning_attention", BACKENDS, backend, call)
    return chosen.function(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        slopes_H=slopes_H,
        scale=q_BTHK.shape[-1] ** -0.5 if scale is None else float(scale),
        initial_state=initial_state,
        segment_ids=segment_ids,
        precision=precision,
        short_memory=short_memory,
    )


def simple_gla(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_BTH: jax.Array,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    precision: str = "default",
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """`lightning_attention` with a decay of its own for every token and head (simple GLA; Mamba-2's recurrence).

    `S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t` and `o_t = scale * q_t S_t`. Differentiable in the decays too.

    Args:
      log_decay_BTH: float32, each <= 0. The decay at padding is not used, nor that at a document's first token unless
        an initial state comes before it.
      the others: as in `lightning_attention`, and so are the results and errors.
    """
    _check(q_BTHK, k_BTHK, v_BTHV, None, initial_state, segment_ids)
    if log_decay_BTH.shape != q_BTHK.shape[:3]:
        raise ValueError(f"log_decay_BTH has shape {log_decay_BTH.shape} but must be {q_BTHK.shape[:3]} (B,T,H)")
    _check_precision(precision)
    call = {"q_BTHK": q_BTHK, "k_BTHK": k_BTHK, "v_BTHV": v_BTHV}
    chosen = dispatch.choose("simple_gla", BACKENDS, backend, call)
    return chosen.function(
        q_BTHK,
        k_BTHK,
        v_BTHV,
        log_decay_BTH=log_decay_BTH,
        scale=q_BTHK.shape[-1] ** -0.5 if scale is None else float(scale),
        initial_state=initial_state,
        segment_ids=segment_ids,
        precision=precision,
    )


def lightning_decode_step(
    q_BHK: jax.Array,
    k_BHK: jax.Array,
    v_BHV: jax.Array,
    slopes_H: ArrayLike,
    state_BHKV: jax.Array,
    *,
    scale: float | None = None,
    valid_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token of `lightning_attention`, all in float32; donate the state to have it updated in place.

    XLA makes one fusion of it, which on an H100 beats a kernel of our own (docs/decisions/0016).

    Args:
      q_BHK, k_BHK, v_BHV: the token's rows, floating.
      slopes_H: float32.
      state_BHKV: float32, before the token.
      scale: factor of the output; None is K**-0.5.
      valid_B: bool; a False row keeps its state and gives zeros. None is all True.

    Returns:
      o_BHV in v's dtype and the float32 state after the token.
    """
    scale = q_BHK.shape[-1] ** -0.5 if scale is None else float(scale)
    return xla.decode_step(q_BHK, k_BHK, v_BHV, slopes_H, state_BHKV, valid_B, scale=scale)


def _check(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    slopes_H: ArrayLike | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> None:
    if q_BTHK.ndim != 4 or v_BTHV.ndim != 4 or q_BTHK.shape != k_BTHK.shape or v_BTHV.shape[:3] != q_BTHK.shape[:3]:
        raise ValueError(
            f"q, k, v have shapes {q_BTHK.shape}, {k_BTHK.shape}, {v_BTHV.shape} but must be [B,T,H,K], [B,T,H,K], "
            "[B,T,H,V] (repeat K and V heads where there are fewer)"
        )
    batch, length, heads, width = q_BTHK.shape
    if min(q_BTHK.shape) < 1 or v_BTHV.shape[-1] < 1:
        raise ValueError(f"q, v have shapes {q_BTHK.shape}, {v_BTHV.shape} but no axis may be empty")
    if slopes_H is not None and np.shape(slopes_H) != (heads,):
        raise ValueError(f"slopes have shape {np.shape(slopes_H)} but q has {heads} heads")
    state = (batch, heads, width, v_BTHV.shape[-1])
    if initial_state is not None and initial_state.shape != state:
        raise ValueError(f"initial_state has shape {initial_state.shape} but must be {state} (B,H,K,V)")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids have shape {segment_ids.shape} but must be {(batch, length)} (B,T)")


def _check_precision(precision: str) -> None:
    if precision not in ("default", "high"):
        raise ValueError(f'precision is {precision!r} but must be "default" or "high"')
