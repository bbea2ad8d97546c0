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
    return Ceilings(copy, matmul_rate(side))


def matmul_rate(side: int, dtype: str = "bfloat16") -> float:
    """FLOP/s of one product of two random [side, side] matrices, measured on the default device."""
    a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in (1, 2))
    return 2 * side**3 / milliseconds(jax.jit(jnp.matmul), a, b) * 1e3
