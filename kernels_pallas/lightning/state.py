"""The state that tokens leave behind, without their outputs: one matrix product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kernels_pallas.lightning.marks import BLOCK, in_chunks, sum_before


def lightning_state(
    k_BTHK: jax.Array, v_BTHV: jax.Array, slopes_H: ArrayLike, *, segment_ids: jax.Array | None = None
) -> jax.Array:
    """What `lightning_attention` gives as its state from none, float32 [B,H,K,V]: `sum_t exp(-s_h n_t) k_t^T v_t`.

    The sum is over the last document's tokens, n_t the number of real tokens after t. Differentiable in k and v.

    Args:
      k_BTHK, v_BTHV, slopes_H, segment_ids: as in `api.lightning_attention`.
    """
    dtype, length = jnp.result_type(k_BTHK, v_BTHV), k_BTHK.shape[1]
    ids = jnp.zeros((1, length), jnp.int32) if segment_ids is None else segment_ids
    later = _real_tokens_after(ids)
    slopes_H = jax.lax.stop_gradient(jnp.asarray(slopes_H, jnp.float32))
    write_bTH = jnp.where(_in_last_document(ids)[..., None], jnp.exp(-slopes_H * later[..., None]), 0.0)
    decayed = (k_BTHK.astype(jnp.float32) * write_bTH[..., None]).astype(dtype)
    # Without HIGHEST, accelerators would round float32 operands to bfloat16 or TF32.
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(
        "bthk,bthv->bhkv", decayed, v_BTHV.astype(dtype), precision=exact, preferred_element_type=jnp.float32
    )


def _in_last_document(ids_BT: jax.Array) -> jax.Array:
    """Whether a token is real and no real token of another id comes after it."""
    real, places = ids_BT >= 0, jnp.arange(ids_BT.shape[1])
    last = jnp.max(jnp.where(real, places, -1), axis=1, keepdims=True)
    last_id = jnp.sum(jnp.where(places == last, ids_BT, 0), axis=1, keepdims=True)
    foreign = jnp.max(jnp.where(real & (ids_BT != last_id), places, -1), axis=1, keepdims=True)
    return real & (places > foreign)


def _real_tokens_after(ids_BT: jax.Array) -> jax.Array:
    real = ids_BT >= 0
    in_rows = in_chunks(real.astype(jnp.int32), BLOCK, 0)
    before = sum_before(in_rows).reshape(*real.shape[:1], -1)[:, : real.shape[1]]
    return jnp.sum(real, axis=1, keepdims=True, dtype=jnp.int32) - before - real
