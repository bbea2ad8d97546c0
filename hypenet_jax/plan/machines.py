"""The machines that a run can be planned for: what a chip has, and how its absent devices are opened.

TPU figures are of the pages "TPU v5e", "TPU v5p" and "TPU v6e" of the Cloud TPU documentation; what the compiler lets a
program use is from its own message when a program is too large (libtpu 0.0.42). GPU figures are of NVIDIA's data
sheets of the H100 SXM and H200 SXM (NVLink: 900 GB/s, half of it in each direction) and of the DGX H100 and H200 (one
400 Gbit/s port of the network between hosts a GPU); a GPU's memory is what CUDA reports.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax

from hypenet_jax.errors import HypenetError
from hypenet_jax.parallel.presets import MOST_SLICES, slices_of
from kernels_pallas.absent import open_topology

GIB = 2**30
# Where `make aot` puts the compilers of absent machines, apart from the other packages.
APART = pathlib.Path(sys.prefix) / "aot"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. memory: GiB that it has for programs (None: not stated). flops: dense bfloat16, a second. memory_rate,
    link_rate, dcn_rate: bytes a second; link_rate is of one port in one direction, and a torus axis has two ports."""

    memory: float | None
    flops: float
    memory_rate: float
    link_rate: float
    dcn_rate: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine by its preset's name: its chip, how many, the topology as `open_topology` names it, and its hosts where
    a slower network than that of the chips joins them; of a TPU its slices, each of that topology."""

    name: str
    chip: Chip
    chips: int
    platform: str  # "tpu", "gpu" or "cpu"
    topology: str
    hosts: int = 1
    slices: int = 1

    @property
    def usable(self) -> float | None:
        """Bytes of a chip that a compiled program may take, where its compiler does not refuse what is too large."""
        return GPU_SHARE * self.chip.memory * GIB if self.platform == "gpu" and self.chip.memory else None


# A GPU's memory also holds CUDA's context, the programs, NCCL's buffers and cuBLAS's workspace, none of which the
# compiler counts. The command line lets JAX take this share of it.
GPU_SHARE = 0.95
# GPUs of one host, which NVLink joins.
GPUS_A_HOST, MOST_HOSTS = 8, 128
# Virtual devices of a CPU, which all share its cores.
MOST_CPUS = 64
V5E = Chip(15.75, 197e12, 819e9, 50e9, 3.125e9)
V5P = Chip(95.74, 459e12, 2765e9, 100e9, 6.25e9)
V6E = Chip(31.25, 918e12, 1640e9, 100e9, 12.5e9)
H100 = Chip(79.1, 989e12, 3350e9, 450e9, 50e9)
H200 = Chip(139.8, 989e12, 4800e9, 450e9, 50e9)
# No figures: a CPU plan shows memory and collectives, not time.
CPU = Chip(None, 0.0, 0.0, 0.0, 0.0)
TPUS = {"v5e": V5E, "v5p": V5P, "v6e": V6E}

# Shapes of the slices that the Cloud offers, in chips; libtpu calls the v5p "v5".
_SHAPES = {
    "v5e": {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v6e": {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"},
}
_GPUS = {"h100": H100, "h200": H200}
# As JAX names the devices. An H100 of another form (PCIe, NVL) is slower, so that nothing but the SXM's name counts.
_KINDS = {
    "NVIDIA H100 80GB HBM3": H100,
    "NVIDIA H200": H200,
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5": V5P,
    "TPU v5p": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls by this `device_kind`; None for one whose figures we do not have."""
    return _KINDS.get(device_kind)


def machine(name: str) -> Machine:
    """The machine of this name: "v5e-16", "v5p-64" (cores, two a chip), "2xv6e-64" (two slices), "h100x8", "h200x16"
    (two hosts of eight), "cpu8", ...

    Raises:
      HypenetError: a name that stands for no machine we know.
    """
    slices, one = slices_of(name)
    if match := re.fullmatch(r"(v5e|v5p|v6e)-(\d{1,6})", one):
        kind, (count, half) = match[1], divmod(int(match[2]), 2 if match[1] == "v5p" else 1)
        if count in _SHAPES[kind] and not half:
            prefix = "v5" if kind == "v5p" else kind
            topology = f"{prefix}:{_SHAPES[kind][count]}"
            return Machine(name, TPUS[kind], slices * count, "tpu", topology, slices=slices)
    elif match := re.fullmatch(r"(h100|h200)x(\d{1,6})", name):
        count = int(match[2])
        hosts = max(1, count // GPUS_A_HOST)
        if count in (1, 2, 4, hosts * GPUS_A_HOST) and hosts <= MOST_HOSTS:
            return Machine(name, _GPUS[match[1]], count, "gpu", f"{match[1]}:{hosts}x{count // hosts}", hosts)
    elif (match := re.fullmatch(r"cpu(\d{1,6})", name)) and int(match[1]) in range(1, MOST_CPUS + 1):
        return Machine(name, CPU, int(match[1]), "cpu", "")
    raise HypenetError(
        f"topology {name!r} is no machine we know; give v5e-N or v6e-N of 4 to 256 chips, v5p-N of 8 to 1024 cores "
        f"(powers of two), 2 to {MOST_SLICES} slices of one (2xv5e-16), h100xN or h200xN of 1, 2 or 4 GPUs or of 1 to "
        f"{MOST_HOSTS} hosts of 8, or cpuN of 1 to {MOST_CPUS}"
    )


def use_cpu(devices: int) -> None:
    """Make this process a CPU one with at least so many devices, for compilers that need no accelerator.

    Raises:
      HypenetError: JAX has already started with fewer devices.
    """
    if APART.is_dir() and str(APART) not in sys.path:
        sys.path.append(str(APART))
    # Where JAX runs already, as in a test, what matters is what it has.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", max(1, devices))
    if len(jax.devices("cpu")) < devices:
        raise HypenetError(f"this process has {len(jax.devices('cpu'))} CPU devices and {devices} are asked for")


def open_devices(machine: Machine) -> list[Any]:
    """The machine's devices to compile for; see `use_cpu`, which has to be called first.

    Raises:
      HypenetError: the compiler for that machine is not installed.
    """
    if machine.platform == "cpu":
        return list(jax.devices("cpu")[: machine.chips])
    package = "libtpu" if machine.platform == "tpu" else "jax_cuda13_plugin"
    if importlib.util.find_spec(package) is None and not (APART / package).is_dir():
        kind = "TPU" if machine.platform == "tpu" else "CUDA"
        raise HypenetError(
            f"{machine.name} needs the {kind} compiler {package}, which is not installed; run `make aot`"
        )
    with quiet(), sigterm_kept():
        return open_topology(machine.topology, slices=machine.slices)


def compiler_options(machine: Machine, quick: bool) -> dict[str, str]:
    """XLA's options for that machine.

    For a GPU: where ptxas lies, which its compiler calls, if `make aot` installed it. A program of an absent GPU may
    take 80% of its memory times a "slop factor", set here so that GPU_SHARE comes of it. Beyond that XLA looks for
    what could be made twice, for many minutes; `quick` leaves that out, so that what is short is short before it.
    """
    if machine.platform != "gpu":
        return {}
    options = {"xla_gpu_memory_limit_slop_factor": f"{100 * GPU_SHARE / 0.8:.0f}"}
    if quick:
        options["xla_disable_hlo_passes"] = "rematerialization"
    cuda = APART / "nvidia/cu13"
    return options | ({"xla_gpu_cuda_data_dir": str(cuda)} if cuda.is_dir() else {})


@contextlib.contextmanager
def sigterm_kept() -> Iterator[None]:
    """SIGTERM does what it did before: libtpu takes it as it is loaded, and would print the stack of the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # None: a handler that is not Python's, which cannot be put back; the default ends the process quietly.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class quiet:
    """Nothing on standard error: libtpu complains that there is no metadata service of a TPU host, CUDA's plugin that
    there is no driver."""

    def __enter__(self) -> None:
        sys.stderr.flush()
        self._kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 2)
        os.close(sink)

    def __exit__(self, *_exception: object) -> None:
        os.dup2(self._kept, 2)
        os.close(self._kept)
