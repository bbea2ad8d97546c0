"""Attention on a GPU as cases of `aot`: a sequence forward and backward, and a few queries against a cache."""

import jax
import jax.numpy as jnp

from kernels_pallas.attention import gpu


def sequence(length, width=128, heads=16, kv_heads=8, batch=1, dtype="bfloat16", segments=False):
    q, k = (jax.ShapeDtypeStruct((batch, length, n, width), dtype) for n in (heads, kv_heads))
    ids, growth = jax.ShapeDtypeStruct((batch, length), jnp.int32), jax.ShapeDtypeStruct((length,), jnp.float32)

    def both(q, k, v, do, ids, growth):
        options = (
            {"segment_ids": ids, "logit_scale": growth} if segments else {"segment_ids": None, "logit_scale": None}
        )
        o, pull = jax.vjp(lambda *x: gpu.attention(*x, causal=True, scale=0.1, **options), q, k, v)
        return o, pull(do)

    return both, [q, k, k, q, ids, growth]


def cache(slots, length=1, width=128, heads=16, kv_heads=8, batch=1, dtype="bfloat16"):
    q = jax.ShapeDtypeStruct((batch, length, heads, width), dtype)
    k = jax.ShapeDtypeStruct((batch, slots, kv_heads, width), dtype)

    def attend(q, k, v, positions):
        return gpu.cached_attention(q, k, v, positions, scale=0.1, logit_scale=None)

    return attend, [q, k, k, jax.ShapeDtypeStruct((batch, length), jnp.int32)]
