"""The Lightning recurrence in chunks of tokens, in plain XLA: any platform, any length.

Within a chunk the recurrence is a masked matrix product, across chunks a scan that carries the state. With n_i the
number of real (non-padding) tokens of the chunk up to and including token i, s the slope and S the state before the
chunk:

    D_ij   = exp(-s (n_i - n_j)) where j <= i, both real, in one document       (intra)
    read_i = exp(-s n_i)         where i is real and of the document that S belongs to
    write_j= exp(-s (n_C - n_j)) where j is real and of the chunk's last document
    keep   = exp(-s n_C)         where the chunk's last document is the one that S belongs to
    o = scale ((q k^T * D) v + (read * q) S),    S' = keep S + (write * k)^T v

Every exponent is <= 0. The factored form k * exp(+s j) overflows float32 within a few hundred tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kernels_pallas.dispatch import Backend

MAX_CHUNK = 128
MIN_CHUNK = 64


class Static(NamedTuple):
    scale: float
    chunk: int
    high: bool


class Marks(NamedTuple):
    """Who is who in each chunk; the batch axis b is 1 where all rows agree. N chunks of C tokens."""

    real_NbC: jax.Array
    count_NbC: jax.Array
    document_NbC: jax.Array
    before_Nb: jax.Array  # the document that the state before the chunk belongs to


def lightning_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    slopes_H: ArrayLike,
    *,
    scale: float,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    precision: str,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.lightning_attention`. `chunk` is the number of tokens a chunk; None chooses by the head width."""
    static = Static(scale, chunk or _chunk(q_BTHK, v_BTHV), precision == "high")
    return _jitted(static, q_BTHK, k_BTHK, v_BTHV, slopes_H, initial_state, segment_ids)


@partial(jax.jit, static_argnums=0)
def _jitted(static, q, k, v, slopes_H, initial_state, segment_ids):
    if initial_state is None:
        # Zeros that vary over the same mesh axes as the inputs, which a scan inside shard_map asks for.
        initial_state = jnp.zeros_like(q[:, 0, :, :, None] * v[:, 0, :, None, :], jnp.float32)
    return _recurrence(static, q, k, v, jnp.asarray(slopes_H, jnp.float32), initial_state, segment_ids)


@partial(jax.jit, static_argnames="scale")
def decode_step(q_BHK, k_BHK, v_BHV, slopes_H, state_BHKV, valid_B, *, scale):
    """See `api.lightning_decode_step`."""
    q, k, v = (x.astype(jnp.float32) for x in (q_BHK, k_BHK, v_BHV))
    state = state_BHKV.astype(jnp.float32)
    decay_H11 = jnp.exp(-jnp.asarray(slopes_H, jnp.float32))[:, None, None]
    after = decay_H11 * state + k[..., :, None] * v[..., None, :]
    o = scale * jnp.einsum("bhk,bhkv->bhv", q, after, precision=jax.lax.Precision.HIGHEST)
    if valid_B is not None:
        after = jnp.where(valid_B[:, None, None, None], after, state)
        o = jnp.where(valid_B[:, None, None], o, 0.0)
    return o.astype(v_BHV.dtype), after


def _chunk(q_BTHK: jax.Array, v_BTHV: jax.Array) -> int:
    # Measured on two CPU cores, T=512, forward and backward: at widths 32 and 128 a chunk of 64 is within 10% of
    # the best. At width 128, which is an accelerator's, a chunk of 128 costs those cores 25 to 40% more.
    length, width = q_BTHK.shape[1], max(q_BTHK.shape[-1], v_BTHV.shape[-1])
    chunk = min(MAX_CHUNK, max(MIN_CHUNK, width))
    return min(chunk, -(-length // 8) * 8)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(static: Static, q, k, v, slopes_H, initial_state, segment_ids):
    return _forward(static, q, k, v, slopes_H, initial_state, segment_ids)[0]


def _forward(static: Static, q, k, v, slopes_H, initial_state, segment_ids):
    dtype, dot = _arithmetic(static, q, k, v)
    marks, shared = _marks(static.chunk, q.shape[1], segment_ids), _shared(static.chunk, slopes_H, segment_ids)

    def chunk(state, x):
        q, k, v, mark = x
        intra, read, write, keep = _decays(slopes_H, mark, shared)
        scores = (dot("bhik,bhjk->bhij", q, k) * intra).astype(dtype)
        o = dot("bhij,bhjv->bhiv", scores, v) + dot("bhik,bhkv->bhiv", (q * read).astype(dtype), state.astype(dtype))
        state = keep * state + dot("bhik,bhiv->bhkv", (k * write).astype(dtype), v)
        return state, (static.scale * o).astype(out_dtype)

    out_dtype = v.dtype
    xs = (*(_to_chunks(static.chunk, x, dtype) for x in (q, k, v)), marks)
    state, o = jax.lax.scan(chunk, initial_state.astype(jnp.float32), xs)
    # The residuals are the inputs alone: the backward recomputes the states that it passes.
    return (_from_chunks(o, q.shape[1]), state), (q, k, v, slopes_H, initial_state, segment_ids)


def _backward(static: Static, residuals, cotangents):
    q, k, v, slopes_H, initial_state, segment_ids = residuals
    do, dstate = cotangents
    dtype, dot = _arithmetic(static, q, k, v)
    marks, shared = _marks(static.chunk, q.shape[1], segment_ids), _shared(static.chunk, slopes_H, segment_ids)

    def rising(state, x):
        """The part of dq that came through the state; needs no intra-chunk table."""
        k, v, do, mark = x
        _, read, write, keep = _decays(slopes_H, mark, shared, intra=False)
        dq = read * dot("bhiv,bhkv->bhik", do, state.astype(dtype))
        return keep * state + dot("bhik,bhiv->bhkv", (k * write).astype(dtype), v), dq

    def falling(dstate, x):
        """The rest of dq, and dk, dv, so that the table and do v^T are made once."""
        q, k, v, do, dq, mark = x
        intra, read, write, keep = _decays(slopes_H, mark, shared)
        scores = (dot("bhik,bhjk->bhij", q, k) * intra).astype(dtype)
        dscores = (dot("bhiv,bhjv->bhij", do, v) * intra).astype(dtype)
        ds = dstate.astype(dtype)
        dq = scale * (dq + dot("bhij,bhjk->bhik", dscores, k))
        dk = scale * dot("bhij,bhik->bhjk", dscores, q) + write * dot("bhjv,bhkv->bhjk", v, ds)
        dv = scale * dot("bhij,bhiv->bhjv", scores, do) + write * dot("bhjk,bhkv->bhjv", k, ds)
        dstate = keep * dstate + scale * dot("bhik,bhiv->bhkv", (q * read).astype(dtype), do)
        return dstate, (dq.astype(q_dtype), dk.astype(k_dtype), dv.astype(v_dtype))

    scale, length, q_dtype, k_dtype, v_dtype = static.scale, q.shape[1], q.dtype, k.dtype, v.dtype
    q, k, v, do = (_to_chunks(static.chunk, x, dtype) for x in (q, k, v, do))
    _, dq = jax.lax.scan(rising, initial_state.astype(jnp.float32), (k, v, do, marks))
    dstate, grads = jax.lax.scan(falling, dstate.astype(jnp.float32), (q, k, v, do, dq, marks), reverse=True)
    return (*(_from_chunks(x, length) for x in grads), None, dstate.astype(initial_state.dtype), None)


_recurrence.defvjp(_forward, _backward)


def _arithmetic(static: Static, *inputs) -> tuple[Any, Any]:
    """The dtype of the matrix products' operands, and the product itself (accumulating in float32)."""
    dtype = jnp.float32 if static.high else jnp.result_type(*inputs)
    # Without HIGHEST, accelerators would round float32 operands to bfloat16 or TF32.
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return dtype, partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)


def _marks(chunk: int, length: int, segment_ids: jax.Array | None) -> Marks:
    if segment_ids is None:
        segment_ids = jnp.zeros((1, length), jnp.int32)
    ids = jnp.pad(segment_ids, ((0, 0), (0, -length % chunk)), constant_values=-1)
    real = ids >= 0
    # A document begins where the id differs from the last real token's, however many padding tokens lie between.
    places = jnp.where(real, jnp.arange(ids.shape[1]), -1)
    last = jnp.pad(jax.lax.cummax(places, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    begins = real & (last >= 0) & (ids != jnp.take_along_axis(ids, jnp.maximum(last, 0), axis=1))
    document = jnp.cumsum(begins, axis=1, dtype=jnp.int32)
    before = jnp.pad(document[:, chunk - 1 : -1 : chunk], ((0, 0), (1, 0)))
    real, document = (x.reshape(x.shape[0], -1, chunk).swapaxes(0, 1) for x in (real, document))
    return Marks(real, jnp.cumsum(real, axis=-1, dtype=jnp.int32), document, before.T)


def _shared(chunk: int, slopes_H: jax.Array, segment_ids: jax.Array | None) -> jax.Array | None:
    """The table D [1,H,C,C] of a chunk of one document without padding, which serves every chunk if there are no ids.

    It serves the last chunk too: the tokens that fill it up are zeros.
    """
    if segment_ids is not None:
        return None
    return _intra(slopes_H, jax.tree.map(lambda x: x[0], _marks(chunk, chunk, None)))


def _intra(slopes_H: jax.Array, mark: Marks) -> jax.Array:
    real, count, document, _ = mark
    lag = count[:, :, None] - count[:, None, :]
    causal = jnp.tri(count.shape[-1], dtype=bool)
    seen = causal & real[:, :, None] & real[:, None, :] & (document[:, :, None] == document[:, None, :])
    return jnp.where(seen[:, None], jnp.exp(-slopes_H[:, None, None] * jnp.maximum(lag, 0)[:, None]), 0.0)


def _decays(slopes_H: jax.Array, mark: Marks, shared: jax.Array | None, intra: bool = True):
    """intra [b,H,C,C], read and write [b,H,C,1], keep [b,H,1,1] of one chunk (module docstring)."""
    real, count, document, before = mark
    total, last = count[:, -1:], document[:, -1:]

    def decay(tokens, where):
        return jnp.where(where[:, None], jnp.exp(-slopes_H[:, None] * tokens[:, None]), 0.0)[..., None]

    read = decay(count, real & (document == before[:, None]))
    write = decay(total - count, real & (document == last))
    keep = decay(total, last == before[:, None])
    if not intra:
        return None, read, write, keep
    return _intra(slopes_H, mark) if shared is None else shared, read, write, keep


def _to_chunks(chunk: int, x_BTHD: jax.Array, dtype) -> jax.Array:
    """[B,T,H,D] -> [N,B,H,C,D], the tail filled up with zeros."""
    batch, length, heads, width = x_BTHD.shape
    x = jnp.pad(x_BTHD.astype(dtype), ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
    return x.reshape(batch, -1, chunk, heads, width).transpose(1, 0, 3, 2, 4)


def _from_chunks(x_NBHCD: jax.Array, length: int) -> jax.Array:
    x = x_NBHCD.transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _refuses(*, q_BTHK, k_BTHK, v_BTHV, segment_ids) -> str | None:
    del segment_ids
    for name, x in (("q", q_BTHK), ("k", k_BTHK), ("v", v_BTHV)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}, and it accumulates in float32 from float32 or bfloat16 only"
    return None


BACKEND = Backend("xla", lightning_attention, _refuses)
