"""Compile for accelerators that are not here: TPUs with libtpu alone, GPUs with JAX's CUDA plugin and no driver."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

# The smallest topology that the TPU compiler has of each kind; v5p and v6e by the names of their makers.
TPUS = {"v5e": "v5e:2x4", "v5p": "v5:2x2x1", "v6e": "v6e:2x4"}
# Hopper GPUs in the SXM form: name as JAX gives it; bytes of memory as CUDA reports them (the H200's to 0.1 GiB); bytes
# a second by NVIDIA's data sheets.
GPUS = {
    "h100": ("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000),
    "h200": ("NVIDIA H200", 150_109_106_995, 4_800_000_000_000),
}
# XLA's GpuTargetConfigProto. What does not differ between the two is of the data sheet and of CUDA's limits for sm_90.
_HOPPER = """
gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: {rate}
  device_memory_size: {memory}
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


def open_topology(name: str, gpu: str | None = None, slices: int = 1) -> list[Any]:
    """The devices of an absent machine, for shardings of what is compiled for it.

    Args:
      name: "v5e", "v5p", "v6e", or a topology as libtpu names it ("v5e:4x4"); "h100" or "h200" for one GPU, "h100:2x8"
        for two hosts of eight; "gpu" or "gpu:2x8" for those that `gpu` tells of.
      gpu: the text of XLA's GpuTargetConfigProto.
      slices: so many TPU slices of that topology, joined by the data-center network.

    Raises:
      ValueError: "gpu" without its description.
      Exception: whatever JAX raises where the compiler for that machine is not installed.
    """
    if found := re.fullmatch(r"(gpu|h100|h200)(?::(\d+x\d+))?", name):
        if found[1] != "gpu":
            kind, memory, rate = GPUS[found[1]]
            gpu = _HOPPER.format(name=kind, memory=memory, rate=rate)
        if gpu is None:
            raise ValueError("a GPU that is not here needs its description: give the text of a GpuTargetConfigProto")
        # Slices, hosts a slice, GPUs a host: JAX gives every host a process of its own.
        options = {"target_config": gpu, "topology": f"1x{found[2] or '1x1'}"}
        return list(topologies.get_topology_desc(platform="cuda", topology_name="", **options).devices)
    # libtpu would look for a TPU's metadata service, and for another process that has the TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    # A single slice is named no number: its devices' ids then begin at 0.
    several = {"num_slices": slices} if slices > 1 else {}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=TPUS.get(name, name), **several).devices)


@contextlib.contextmanager
def compiling_for(device: Any) -> Iterator[None]:
    """Within it, traced code takes `device` for the one it will run on (`compat.platform`)."""
    kind = "tpu" if device.platform == "tpu" else "gpu"
    abstract = jax.sharding.AbstractDevice(device.device_kind, None, kind)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=abstract)):
        yield
