"""What this machine can do at best, measured: the shares in the table are of these."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas.bench.timing import milliseconds


@dataclass(frozen=True)
class Ceilings:
    """`copy` in bytes a second, read and written ones counted; `matmul` in bfloat16 FLOP/s."""

    copy: float
    matmul: float


def ceilings(small: bool) -> Ceilings:
    """Measured on random data (zeros can run faster): a copy far larger than any cache, and one large product."""
    elements, side = (2**24, 1024) if small else (2**29, 8192)
    x = jax.random.normal(jax.random.key(0), (elements,), jnp.bfloat16)
    copy = 4 * elements / milliseconds(jax.jit(lambda x: x + jnp.bfloat16(1)), x) * 1e3
    a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in (1, 2))
    return Ceilings(copy, 2 * side**3 / milliseconds(jax.jit(jnp.matmul), a, b) * 1e3)
