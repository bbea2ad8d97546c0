"""The recurrence in chunks of tokens, in plain XLA: any platform, any length. The formulas are in marks.py.

Within a chunk the recurrence is a masked matrix product, across chunks a scan that carries the state.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kernels_pallas.dispatch import Backend
from kernels_pallas.lightning.marks import Decay, marks
from kernels_pallas.lightning.recurrence import Options, Passes, backend_function

MAX_CHUNK = 128
MIN_CHUNK = 64


class Mark(NamedTuple):
    """The marks of the chunks as the scan takes them, and a table D [1,H,C,C] where one serves every chunk."""

    lag_NbhC: jax.Array
    document_NbC: jax.Array
    before_Nb: jax.Array
    after_Nb: jax.Array


def forward(
    options: Options, q, k, v, decay: Decay, initial_state, segment_ids, chunk: int | None = None
) -> tuple[jax.Array, jax.Array, None]:
    """See `recurrence.Passes`. `chunk` is the number of tokens a chunk; None chooses by the head width."""
    chunk = chunk or _chunk(q, v)
    dtype, dot = _arithmetic(options, q, k, v)
    xs_marks, shared = _marks(chunk, q.shape[1], decay, segment_ids)
    out_dtype = v.dtype

    def body(state, x):
        q, k, v, mark = x
        intra, read, write, keep = _decays(mark, shared)
        scores = (dot("bhik,bhjk->bhij", q, k) * intra).astype(dtype)
        o = dot("bhij,bhjv->bhiv", scores, v) + dot("bhik,bhkv->bhiv", (q * read).astype(dtype), state.astype(dtype))
        state = keep * state + dot("bhik,bhiv->bhkv", (k * write).astype(dtype), v)
        return state, (options.scale * o).astype(out_dtype)

    xs = (*(_to_chunks(chunk, x, dtype) for x in (q, k, v)), xs_marks)
    state, o = jax.lax.scan(body, initial_state, xs)
    # Nothing is saved: the backward recomputes the states that it passes.
    return _from_chunks(o, q.shape[1]), state, None


def backward(
    options: Options, q, k, v, decay: Decay, initial_state, segment_ids, saved, do, dstate, chunk: int | None = None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """See `recurrence.Passes`."""
    del saved
    chunk = chunk or _chunk(q, v)
    dtype, dot = _arithmetic(options, q, k, v)
    xs_marks, shared = _marks(chunk, q.shape[1], decay, segment_ids)

    def rising(state, x):
        """The part of dq that came through the state; needs no intra-chunk table."""
        k, v, do, mark = x
        _, read, write, keep = _decays(mark, shared, intra=False)
        dq = read * dot("bhiv,bhkv->bhik", do, state.astype(dtype))
        return keep * state + dot("bhik,bhiv->bhkv", (k * write).astype(dtype), v), dq

    def falling(dstate, x):
        """The rest of dq, and dk, dv, so that the table and do v^T are made once."""
        q, k, v, do, dq, mark = x
        intra, read, write, keep = _decays(mark, shared)
        scores = (dot("bhik,bhjk->bhij", q, k) * intra).astype(dtype)
        dscores = (dot("bhiv,bhjv->bhij", do, v) * intra).astype(dtype)
        ds = dstate.astype(dtype)
        dq = scale * (dq + dot("bhij,bhjk->bhik", dscores, k))
        dk = scale * dot("bhij,bhik->bhjk", dscores, q) + write * dot("bhjv,bhkv->bhjk", v, ds)
        dv = scale * dot("bhij,bhiv->bhjv", scores, do) + write * dot("bhjk,bhkv->bhjv", k, ds)
        dstate = keep * dstate + scale * dot("bhik,bhiv->bhkv", (q * read).astype(dtype), do)
        return dstate, (dq.astype(q_dtype), dk.astype(k_dtype), dv.astype(v_dtype))

    scale, length = options.scale, q.shape[1]
    q_dtype, k_dtype, v_dtype = (jnp.float32, jnp.float32, v.dtype) if options.wide else (q.dtype, k.dtype, v.dtype)
    q, k, v, do = (_to_chunks(chunk, x, dtype) for x in (q, k, v, do))
    _, dq = jax.lax.scan(rising, initial_state, (k, v, do, xs_marks))
    dstate, grads = jax.lax.scan(falling, dstate.astype(jnp.float32), (q, k, v, do, dq, xs_marks), reverse=True)
    return (*(_from_chunks(x, length) for x in grads), dstate)


@partial(jax.jit, static_argnames="scale")
def decode_step(q_BHK, k_BHK, v_BHV, slopes_H: ArrayLike, state_BHKV, valid_B, *, scale):
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


def _arithmetic(options: Options, *inputs) -> tuple[Any, Any]:
    """The dtype of the matrix products' operands, and the product itself (accumulating in float32)."""
    dtype = jnp.float32 if options.high else jnp.result_type(*inputs)
    # Without HIGHEST, accelerators would round float32 operands to bfloat16 or TF32.
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return dtype, partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)


def _marks(chunk: int, length: int, decay: Decay, segment_ids) -> tuple[Mark, jax.Array | None]:
    """The marks of every chunk; and the table D [1,H,C,C] where one serves them all.

    One serves all where tokens differ in nothing: the last chunk too, as the tokens that fill it up are zeros.
    """
    shared = None
    if segment_ids is None and decay.log_decay_BTH is None:
        full = marks(decay, chunk, chunk, None)
        shared = _intra(full.lag_bhNC[:, :, 0], full.document_bNC[:, 0])
    lag, document, state = marks(decay, chunk, length, segment_ids)
    by_chunk = Mark(jnp.moveaxis(lag, 2, 0), document.swapaxes(0, 1), state[:, :-1].T, state[:, 1:].T)
    return by_chunk, shared


def _intra(lag_bhC: jax.Array, document_bC: jax.Array) -> jax.Array:
    causal = jnp.tri(lag_bhC.shape[-1], dtype=bool)
    seen = causal & (document_bC[:, :, None] == document_bC[:, None, :]) & (document_bC[:, :, None] >= 0)
    lag = lag_bhC[..., :, None] - lag_bhC[..., None, :]
    return jnp.where(seen[:, None], jnp.exp(-jnp.maximum(lag, 0.0)), 0.0)


def _decays(mark: Mark, shared: jax.Array | None, intra: bool = True):
    """intra [b,h,C,C], read and write [b,h,C,1], keep [b,h,1,1] of one chunk (marks.py)."""
    lag, document, before, after = mark
    total = lag[..., -1:]

    def decay(lag, where_b):
        return jnp.where(where_b[:, None], jnp.exp(-lag), 0.0)[..., None]

    read = decay(lag, document == before[:, None])
    write = decay(total - lag, document == after[:, None])
    keep = decay(total, (before == after)[:, None])
    if not intra:
        return None, read, write, keep
    return _intra(lag, document) if shared is None else shared, read, write, keep


def _to_chunks(chunk: int, x_BTHD: jax.Array, dtype) -> jax.Array:
    """[B,T,H,D] -> [N,B,H,C,D], the tail filled up with zeros."""
    batch, length, heads, width = x_BTHD.shape
    x = jnp.pad(x_BTHD.astype(dtype), ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
    return x.reshape(batch, -1, chunk, heads, width).transpose(1, 0, 3, 2, 4)


def _from_chunks(x_NBHCD: jax.Array, length: int) -> jax.Array:
    x = x_NBHCD.transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _refuses(*, q_BTHK, k_BTHK, v_BTHV) -> str | None:
    for name, x in (("q", q_BTHK), ("k", k_BTHK), ("v", v_BTHV)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}, and it accumulates in float32 from float32 or bfloat16 only"
    return None


BACKEND = Backend("xla", backend_function(Passes(forward, backward)), _refuses)
