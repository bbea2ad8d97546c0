"""A training process killed by SIGKILL, at a random moment and inside a save, then started again."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from toy_training import make_stage, records, run

from hypenet_jax.train.checkpoint import load_params

STAGE = {"steps": 24, "log_every": 1, "checkpoint_every": 1}
HERE = pathlib.Path(__file__).resolve().parent

CHILD = """
import os, pathlib, signal, sys, threading
import jax
import toy_training

directory = pathlib.Path(sys.argv[1])
kill_inside_save = sys.argv[2] == "inside"

def watch():
    while True:
        names = os.listdir(directory / "checkpoints") if (directory / "checkpoints").is_dir() else []
        if any("tmp" in name and int(name.split(".")[0]) > 5 for name in names):
            os.kill(os.getpid(), signal.SIGKILL)

if kill_inside_save:
    threading.Thread(target=watch, daemon=True).start()
toy_training.run(directory, toy_training.make_stage(**STAGE))
""".replace("**STAGE", f"**{STAGE}")


def start(directory, mode):
    paths = [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(directory), mode], env=environment, stderr=subprocess.DEVNULL
    )


def leftovers(directory) -> list[str]:
    return [name for name in os.listdir(directory / "checkpoints") if "tmp" in name]


def kill_at_a_random_moment(directory, seed):
    child = start(directory, "outside")
    deadline = time.monotonic() + 60
    metrics = directory / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(random.Random(seed).uniform(0.0, 0.2))
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


def test_killed_runs_end_as_an_uninterrupted_one(tmp_path):
    directory = tmp_path / "killed"
    kill_at_a_random_moment(directory, seed=time.time_ns())
    for _ in range(3):
        assert start(directory, "inside").wait(timeout=120) == -signal.SIGKILL
        if leftovers(directory):
            break
    assert leftovers(directory), "no kill fell inside a save"
    params, summary = run(directory, make_stage(**STAGE))
    assert 0 < summary["resumed_from"] < 24
    reference, _ = run(tmp_path / "reference", make_stage(**STAGE))
    jax.tree.map(np.testing.assert_array_equal, params, reference)
    jax.tree.map(np.testing.assert_array_equal, load_params(directory)[1], reference)
    assert records(directory) == records(tmp_path / "reference")
    assert [record["step"] for record in records(directory)] == list(range(1, 25))
