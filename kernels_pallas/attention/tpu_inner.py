"""sum(o * do) of each query and head on TPU, as rows of lanes: what the backward of softmax attention starts from.

XLA can compute it too, in code so long that it takes seven times as long to compile (docs/decisions/0020).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import compat
from kernels_pallas.attention.tpu_blocks import LANES
from kernels_pallas.attention.tpu_forward import repeat, strip

MOST_QUERIES, STRIP = 2048, 256  # of a grid step; of the code, which loops over its strips


def inner_products(interpret: Any, o_BHTE: jax.Array, do_BHTE: jax.Array, block: int) -> jax.Array:
    """float32 [B,H,1,T]; T is a multiple of `block`, a power of two."""
    batch, heads, length, width = o_BHTE.shape
    while block * 2 <= MOST_QUERIES and length % (block * 2) == 0:
        block *= 2

    def of_head(b, h, i):
        return b, h, i, 0

    def row_of_head(b, h, i):
        return b, h, 0, i

    call = compat.tpu_call(
        partial(_kernel, size=min(STRIP, block)),
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        interpret=interpret,
        grid=(batch, heads, length // block),
        in_specs=[pl.BlockSpec((1, 1, block, width), of_head)] * 2,
        out_specs=pl.BlockSpec((1, 1, 1, block), row_of_head),
        out_shape=compat.struct((batch, heads, 1, length), jnp.float32, (o_BHTE, do_BHTE)),
        cost_estimate=pl.CostEstimate(
            flops=2 * o_BHTE.size, transcendentals=0, bytes_accessed=o_BHTE.nbytes + do_BHTE.nbytes
        ),
        name="attention_inner",
    )
    return call(o_BHTE, do_BHTE)


def _kernel(o_ref, do_ref, inner_ref, *, size: int):
    def sums(n):
        at = strip(n, size)
        o_RE, do_RE = (ref[0, 0, at].astype(jnp.float32) for ref in (o_ref, do_ref))
        inner_R1 = jnp.sum(o_RE * do_RE, axis=1, keepdims=True)
        inner_ref[0, 0, :, at] = jnp.broadcast_to(inner_R1, (size, LANES)).T[:1]

    repeat(inner_ref.shape[3] // size, sums)
