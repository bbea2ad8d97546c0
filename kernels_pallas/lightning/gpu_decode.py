"""One token of the recurrence on a GPU: each state is read once, updated in place and read out in the same pass."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.typing import ArrayLike

from kernels_pallas.compat import platform, triton_call
from kernels_pallas.dispatch import Backend

COLUMNS = 16  # of the state a program: 128 programs for 16 heads of width 128 at batch 1


@partial(jax.jit, static_argnames=("scale", "interpret"))
def decode_step(
    q_BHK: jax.Array,
    k_BHK: jax.Array,
    v_BHV: jax.Array,
    slopes_H: ArrayLike,
    state_BHKV: jax.Array,
    valid_B: jax.Array | None,
    *,
    scale: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.lightning_decode_step`. The state's buffer is reused where the caller donates it."""
    batch, heads, width = q_BHK.shape
    out_width = v_BHV.shape[-1]
    if valid_B is None:
        valid_B = jnp.ones_like(q_BHK[:, 0, 0], jnp.int32)
    return triton_call(
        partial(_kernel, scale=scale, columns=min(COLUMNS, out_width)),
        grid=(batch, heads, out_width // min(COLUMNS, out_width)),
        out_shape=(
            jax.ShapeDtypeStruct((batch, heads, out_width), v_BHV.dtype),
            jax.ShapeDtypeStruct((batch, heads, width, out_width), jnp.float32),
        ),
        input_output_aliases={5: 1},
        num_warps=4,
        num_stages=1,
        interpret=interpret,
        name="lightning_decode",
    )(jnp.asarray(slopes_H, jnp.float32), valid_B.astype(jnp.int32), q_BHK, k_BHK, v_BHV, state_BHKV)


def _kernel(slopes_ref, valid_ref, q_ref, k_ref, v_ref, state_ref, o_ref, after_ref, *, scale, columns):
    b, h, c = (pl.program_id(axis) for axis in range(3))
    at = pl.ds(c * columns, columns)
    q, k, v = (ref.astype(jnp.float32) for ref in (q_ref[b, h, :], k_ref[b, h, :], v_ref[b, h, at]))
    state = pltriton.load(state_ref.at[b, h, :, at])
    valid = valid_ref[b] != 0
    after = jnp.exp(-slopes_ref[h]) * state + k[:, None] * v[None, :]
    o = jnp.where(valid, scale * jnp.sum(q[:, None] * after, axis=0), 0.0)
    pltriton.store(o_ref.at[b, h, at], o.astype(o_ref.dtype))
    pltriton.store(after_ref.at[b, h, :, at], jnp.where(valid, after, state))


def _refuses(*, q_BHK, v_BHV, state_BHKV) -> str | None:
    if platform() != "gpu":
        return f"it runs on a GPU and this is {platform()}"
    widths = q_BHK.shape[-1], v_BHV.shape[-1]
    if any(width & (width - 1) for width in widths):
        return f"the head widths are {widths}, and it takes powers of two"
    if state_BHKV.dtype != jnp.float32:
        return f"the state is {state_BHKV.dtype}, and it takes float32"
    return None


BACKEND = Backend("gpu", decode_step, _refuses)
