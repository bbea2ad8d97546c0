"""The recurrence one token at a time: slow, and obviously right."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kernels_pallas.dispatch import Backend


def recurrence(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    *,
    slopes_H: ArrayLike | None = None,
    log_decay_BTH: jax.Array | None = None,
    scale: float,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    precision: str = "default",
    short_memory: float | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `api`. Float32 throughout (float64 for float64 inputs), whatever `precision` says."""
    del precision, short_memory, interpret
    dtype = jnp.promote_types(jnp.result_type(q_BTHK, k_BTHK, v_BTHV), jnp.float32)
    if log_decay_BTH is None:
        log_decay_BTH = -jax.lax.stop_gradient(jnp.asarray(slopes_H, dtype))
    decay_BTH = jnp.broadcast_to(jnp.exp(log_decay_BTH.astype(dtype)), q_BTHK.shape[:3])
    # Made from the inputs: inside shard_map the scan's carry must vary over the same mesh axes as they do.
    if initial_state is None:
        initial_state = jnp.zeros_like(q_BTHK[:, 0, :, :, None] * v_BTHV[:, 0, :, None, :], dtype)
    if segment_ids is None:
        segment_ids = jnp.zeros_like(q_BTHK[:, :, 0, 0], jnp.int32)
    first_id = jnp.zeros_like(segment_ids[:, 0])

    def token(carry, x):
        state, last_id, begun = carry
        q_BHK, k_BHK, v_BHV, decay_BH, id_B = x
        real = id_B >= 0
        resets = real & begun & (id_B != last_id)
        kept = jnp.where(resets[:, None, None, None], 0.0, decay_BH[..., None, None] * state)
        written = kept + k_BHK[..., :, None] * v_BHV[..., None, :]
        state = jnp.where(real[:, None, None, None], written, state)
        o_BHV = scale * jnp.sum(q_BHK[..., :, None] * state, axis=-2)
        o_BHV = jnp.where(real[:, None, None], o_BHV, 0.0)
        return (state, jnp.where(real, id_B, last_id), begun | real), o_BHV

    start = (initial_state.astype(dtype), first_id, first_id > 0)
    tokens = [jnp.swapaxes(x.astype(dtype), 0, 1) for x in (q_BTHK, k_BTHK, v_BTHV, decay_BTH)]
    (state, _, _), o_TBHV = jax.lax.scan(token, start, (*tokens, segment_ids.T))
    return jnp.swapaxes(o_TBHV, 0, 1).astype(v_BTHV.dtype), state


BACKEND = Backend("reference", recurrence, lambda **call: None)
