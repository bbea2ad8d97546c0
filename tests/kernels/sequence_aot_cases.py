"""Mixing over a sequence that four chips share, as cases of `aot`: values and gradients, with documents."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hypenet_jax.parallel.sequence import attention, lightning
from kernels_pallas.absent import open_topology
from kernels_pallas.attention import block
from kernels_pallas.lightning import api, slopes

# Only the TPU's kernels: what they refuse shall not compile.
for table in (block.BLOCK_BACKENDS, block.GRADIENT_BACKENDS, api.BACKENDS):
    for name in [name for name in table if name != "tpu"]:
        del table[name]

HEADS, WIDTH = 8, 128
TOKENS = jax.P(None, "seq")


def softmax(topology, length, exchange):
    def mix(q, k, v, ids):
        return attention.attention(q, k, v, axis_name="seq", exchange=exchange, segment_ids=ids)

    return _with_gradients(mix, topology, length, HEADS // 2)


def linear(topology, length):
    def mix(q, k, v, ids):
        return lightning.lightning_attention(q, k, v, slopes(HEADS), axis_name="seq", segment_ids=ids)[0]

    return _with_gradients(mix, topology, length, HEADS)


def _with_gradients(mix, topology, length, kv_heads):
    mesh = Mesh(np.array(open_topology(topology)[:4]), ("seq",))

    def both(q, k, v, ids, do):
        o, pull = jax.vjp(lambda q, k, v: mix(q, k, v, ids), q, k, v)
        return o, *pull(do)

    over_chips = jax.shard_map(both, mesh=mesh, in_specs=TOKENS, out_specs=TOKENS)
    place = NamedSharding(mesh, TOKENS)
    q, k = (jax.ShapeDtypeStruct((1, length, n, WIDTH), jnp.bfloat16, sharding=place) for n in (HEADS, kv_heads))
    return over_chips, [q, k, k, jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=place), q]
