"""Compile for accelerators that are not here: TPUs with libtpu alone, an H100 with JAX's CUDA plugin and no driver."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

# The smallest topology that the TPU compiler has of each kind; v5p and v6e by the names of their makers.
TPUS = {"v5e": "v5e:2x4", "v5p": "v5:2x2x1", "v6e": "v6e:2x4"}


def open_topology(name: str, gpu: str | None = None) -> list[Any]:
    """The devices of an absent machine, for shardings of what is compiled for it.

    Args:
      name: "v5e", "v5p", "v6e", or a topology as libtpu names it ("v5e:4x4"); "gpu" for the one `gpu` tells of.
      gpu: the text of XLA's GpuTargetConfigProto.

    Raises:
      ValueError: "gpu" without its description.
      Exception: whatever JAX raises where the compiler for that machine is not installed.
    """
    if name == "gpu":
        if gpu is None:
            raise ValueError("a GPU that is not here needs its description: give the text of a GpuTargetConfigProto")
        options = {"target_config": gpu, "topology": "1x1x1"}
        return list(topologies.get_topology_desc(platform="cuda", topology_name="", **options).devices)
    # libtpu would look for a TPU's metadata service, and for another process that has the TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    return list(topologies.get_topology_desc(platform="tpu", topology_name=TPUS.get(name, name)).devices)


@contextlib.contextmanager
def compiling_for(device: Any) -> Iterator[None]:
    """Within it, traced code takes `device` for the one it will run on (`compat.platform`)."""
    kind = "tpu" if device.platform == "tpu" else "gpu"
    abstract = jax.sharding.AbstractDevice(device.device_kind, None, kind)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=abstract)):
        yield
