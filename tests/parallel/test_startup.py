"""Joining processes: two of them on this machine, and the mistakes that end in a sentence."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from hypenet_jax.errors import HypenetError
from hypenet_jax.parallel import startup

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = """
from hypenet_jax.parallel import startup
startup.start()
startup.start()
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
from functools import partial
total = jax.pmap(partial(jax.lax.psum, axis_name="i"), axis_name="i")(jnp.asarray([jax.process_index() + 1.0]))
print("total", float(total.addressable_shards[0].data.ravel()[0]), jax.process_count())
"""


def test_two_processes_sum():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="", HYPENET_COORDINATOR=address, HYPENET_PROCESSES="2")
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], env=dict(common, HYPENET_PROCESS_ID=str(n)), cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for n in range(2)
    ]  # fmt: skip
    try:
        for process in both:
            out, errors = process.communicate(timeout=100)
            assert "total 3.0 2" in out, errors[-2000:]
    finally:
        for process in both:
            process.kill()


@pytest.mark.parametrize(
    "given, words",
    [
        (("h:1", "", ""), "HYPENET_PROCESSES is not"),
        (("h:1", "two", "0"), "'two'; give a whole number"),
        (("h:1", "2", "2"), "give 0 to 1"),
        (("h", "2", "0"), "host:port"),
    ],
)
def test_a_mistake_is_a_sentence(given, words):
    with pytest.raises(HypenetError, match=words):
        startup.start(dict(zip(startup.EXPLICIT, given, strict=True)))


def test_one_process_joins_nothing():
    import jax

    startup.start({})
    startup.start({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    startup.start(dict(zip(startup.EXPLICIT, ("h:1", "1", "0"), strict=True)))
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, True),
        ({"SLURM_NTASKS": "2"}, False),  # the batch shell of an allocation, not a step
        ({"HYPENET_CLUSTER": "auto"}, True),
    ],
)
def test_a_cluster_is_recognised(environment, expected):
    assert startup.several(environment) is expected
