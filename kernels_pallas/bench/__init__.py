"""Kernels measured against this machine's ceilings and against the peers installed beside them."""

from kernels_pallas.bench.cases import KERNELS
from kernels_pallas.bench.run import bench

__all__ = ["KERNELS", "bench"]
