"""JAX's multi-controller runtime: one process a host, joined before anything touches a device."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax

from hypenet_jax.errors import HypenetError

COORDINATOR, PROCESSES, PROCESS_ID = "HYPENET_COORDINATOR", "HYPENET_PROCESSES", "HYPENET_PROCESS_ID"
# "auto" where a launcher knows that there are several processes and only JAX knows which: TPU VMs reached by ssh.
CLUSTER = "HYPENET_CLUSTER"
EXPLICIT = (COORDINATOR, PROCESSES, PROCESS_ID)
# A process that has not been heard of for so long is taken for dead, and JAX then ends all the others.
HEARTBEAT = "HYPENET_HEARTBEAT_SECONDS"
HEARTBEAT_SECONDS = 30
# How long the processes wait for each other at the start.
JOIN = "HYPENET_JOIN_SECONDS"
JOIN_SECONDS = 300


def start(environment: Mapping[str, str] = os.environ, *, resumable: bool = True) -> None:
    """Join the other processes of this run; nothing where there is one process or they have been joined.

    resumable: SIGTERM is noted for `preemption`; else it ends the process as it always did.

    Explicit by HYPENET_COORDINATOR (host:port of process 0), HYPENET_PROCESSES and HYPENET_PROCESS_ID, all three or
    none; without them found by JAX on TPU pods and under Slurm. Raises HypenetError, in one sentence, where the
    variables make no sense or the others are not reached.
    """
    if jax.distributed.is_initialized():
        return
    given = [name for name in EXPLICIT if environment.get(name)]
    if given:
        arguments = _explicit(environment, given)
        if arguments["num_processes"] == 1:
            return
    elif several(environment):
        arguments = {}
    else:
        return
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", resumable)
    arguments |= {"heartbeat_timeout_seconds": _whole_number(environment, HEARTBEAT, HEARTBEAT_SECONDS)}
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=_whole_number(environment, JOIN, JOIN_SECONDS))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        where = environment.get(COORDINATOR, "the cluster's coordinator")
        raise HypenetError(
            f"cannot join the other processes at {where} ({reason}); start all of them together"
        ) from error


def several(environment: Mapping[str, str]) -> bool:
    """Whether a TPU pod's or Slurm's variables say that this run has more than one process."""
    if environment.get(CLUSTER) == "auto":
        return True
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    in_step = "SLURM_STEP_ID" in environment or "SLURM_PROCID" in environment
    return len(hosts) > 1 or (in_step and tasks.isdigit() and int(tasks) > 1)


def _explicit(environment: Mapping[str, str], given: list[str]) -> dict:
    missing = [name for name in EXPLICIT if name not in given]
    if missing:
        raise HypenetError(f"{given[0]} is set and {missing[0]} is not; set all of {', '.join(EXPLICIT)}")
    for name in (PROCESSES, PROCESS_ID):
        if not environment[name].isdigit():
            raise HypenetError(f"{name} is {environment[name]!r}; give a whole number")
    processes, process = int(environment[PROCESSES]), int(environment[PROCESS_ID])
    if not 0 <= process < processes:
        raise HypenetError(f"{PROCESS_ID} is {process}; give 0 to {processes - 1}, as {PROCESSES} is {processes}")
    if ":" not in environment[COORDINATOR]:
        raise HypenetError(f"{COORDINATOR} is {environment[COORDINATOR]!r}; give host:port of process 0")
    return {
        "coordinator_address": environment[COORDINATOR],
        "num_processes": processes,
        "process_id": process,
    }


def _whole_number(environment: Mapping[str, str], name: str, otherwise: int) -> int:
    value = environment.get(name, str(otherwise))
    if not value.isdigit() or int(value) < 1:
        raise HypenetError(f"{name} is {value!r}; give a whole number of seconds, at least 1")
    return int(value)
