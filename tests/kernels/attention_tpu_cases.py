"""Attention on TPU as cases of `aot`: a sequence, a sequence sharded over chips, and a few queries against a cache."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from kernels_pallas.absent import open_topology
from kernels_pallas.attention import attention, cached_attention, tpu


def sequence(length, width=128, heads=16, kv_heads=8, batch=1, dtype="bfloat16", backward=False):
    """Documents and position-dependent scaling; forward, or outputs and gradients."""
    q, k = (jax.ShapeDtypeStruct((batch, length, n, width), dtype) for n in (heads, kv_heads))
    ids, growth = jax.ShapeDtypeStruct((batch, length), jnp.int32), jax.ShapeDtypeStruct((length,), jnp.float32)

    def forward(q, k, v, ids, growth):
        return attention(q, k, v, segment_ids=ids, logit_scale_T=growth, backend="tpu")

    def both(q, k, v, do, ids, growth):
        o, pull = jax.vjp(lambda *x: forward(*x, ids, growth), q, k, v)
        return o, pull(do)

    arguments = [q, k, k, *([q] if backward else []), ids, growth]
    return both if backward else forward, arguments, list(range(len(arguments) - 2))


def sharded_sequence(length, topology, width=128, heads=16, kv_heads=8, backward=False):
    """Each chip has its part of the queries and gathers all keys. Heads come before tokens, as XLA lays them out."""
    mesh = Mesh(np.array(open_topology(topology)), ("sequence",))
    chips = mesh.size
    by_token, by_head = jax.P(None, "sequence"), NamedSharding(mesh, jax.P(None, None, "sequence"))

    def gathered(x):
        return jax.lax.all_gather(x, "sequence", axis=1, tiled=True)

    def forward(q, k, v, ids):
        last = jax.lax.axis_index("sequence") * (length // chips) + jnp.arange(length // chips)
        options = {"segment_ids": ids, "key_segment_ids": gathered(ids), "scale": 0.1, "dtype": q.dtype}
        return tpu.attend_block(q, gathered(k), gathered(v), last[None], **options)[0]

    def gradients(q, k, v, ids, do):
        return jax.vjp(lambda q, k, v: forward(q, k, v, ids), q, k, v)[1](do)

    part = jax.shard_map(
        gradients if backward else forward,
        mesh=mesh,
        in_specs=(by_token,) * (5 if backward else 4),
        out_specs=by_token,
    )

    def whole(*arguments):
        swapped = [x.swapaxes(1, 2) if x.ndim == 4 else x for x in arguments]
        return jax.tree.map(lambda x: x.swapaxes(1, 2), part(*swapped))

    q, k = (jax.ShapeDtypeStruct((1, n, length, width), jnp.bfloat16, sharding=by_head) for n in (heads, kv_heads))
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=NamedSharding(mesh, by_token))
    return whole, [q, k, k, ids, *([q] if backward else [])]


def cache(slots, length=1, width=128, heads=16, kv_heads=8, batch=1, dtype="bfloat16"):
    q = jax.ShapeDtypeStruct((batch, length, heads, width), dtype)
    k = jax.ShapeDtypeStruct((batch, slots, kv_heads, width), dtype)

    def attend(q, k, v, positions):
        return cached_attention(q, k, v, positions, backend="tpu")

    return attend, [q, k, k, jax.ShapeDtypeStruct((batch, length), jnp.int32)]
