"""Several CPU processes of one run, started and looked after by a test."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import jax

ROOT = pathlib.Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def started(
    command: Sequence[str], processes: int, logs: pathlib.Path, devices: int = 1, paths: Sequence[pathlib.Path] = ()
) -> Iterator[list[subprocess.Popen]]:
    """`processes` times `python *command`, joined by jax.distributed; process n says what it says in logs/n.log."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    inherited = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(filter(None, [*map(str, paths), str(ROOT), inherited])),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "HYPENET_COORDINATOR": address,
        "HYPENET_PROCESSES": str(processes),
        "HYPENET_HEARTBEAT_SECONDS": "20",
    }
    logs.mkdir(parents=True, exist_ok=True)
    running = []
    try:
        for number in range(processes):
            with open(logs / f"{number}.log", "w") as log:
                running.append(
                    subprocess.Popen(
                        [sys.executable, *command], env=environment | {"HYPENET_PROCESS_ID": str(number)}, stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def codes(running: list[subprocess.Popen], seconds: float = 240) -> list[int]:
    """The exit codes, once all have ended."""
    deadline = time.monotonic() + seconds
    return [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in running]


def said(logs: pathlib.Path) -> str:
    """What all processes said."""
    return "\n".join(f"[{path.name}]\n{path.read_text(errors='replace')}" for path in sorted(logs.glob("*.log")))


def wait_for_lines(file: pathlib.Path, count: int, seconds: float = 120) -> None:
    """Returns once the file has so many lines."""
    wait_for_words(file, "\n", seconds, count)


def wait_for_words(file: pathlib.Path, words: str, seconds: float = 120, count: int = 1) -> None:
    """Returns once the file has the words, so many times."""
    deadline = time.monotonic() + seconds
    while not file.exists() or file.read_text().count(words) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{file} has not got {words!r} {count} times")
        time.sleep(0.02)
