"""A conversion killed by SIGKILL again and again, also inside a save, ends as one that never was."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax

from hypenet_jax.cli import main
from hypenet_jax.halo.workdir import read_json

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Ends itself just before the n-th of its own file operations on paths with `part` in them.
CHILD = """
import os, signal, sys
import jax
from hypenet_jax.cli import main
from hypenet_jax.halo import run

config, directory, part, left = *sys.argv[1:4], int(sys.argv[4])
make_mesh = run.make_mesh
run.make_mesh = lambda axes: make_mesh(axes, jax.devices()[:1])

def watch(event, arguments):
    global left
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and part in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
code = main(["convert", "--config", config, "--workdir", directory])
print("operations", int(sys.argv[4]) - left)
sys.exit(code)
"""


def convert(config, directory, part, operations):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    command = [sys.executable, "-c", CHILD, str(config), str(directory), part, str(operations)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_killed_again_and_again(finished, convert_config, tmp_path, exported, stage_records, on_one_device):
    directory, seed = tmp_path / "run", time.time_ns()
    rng = random.Random(seed)
    print("seed", seed)
    # A whole conversion makes about 400 such operations, half of them within its nine saves.
    kills = [(str(directory), rng.randint(1, 60)), ("orbax-checkpoint-tmp", rng.randint(1, 40))]
    kills += [(str(directory), rng.randint(20, 100)), ("orbax-checkpoint-tmp", rng.randint(1, 40))]
    for part, operations in kills:
        child = convert(convert_config, directory, part, operations)
        assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    assert main(["convert", "--config", str(convert_config), "--workdir", str(directory)]) == 0
    assert exported(directory) == exported(finished)
    assert not [path.name for path in directory.rglob("*") if "partial" in path.name or path.name.endswith(".previous")]
    for name in ("select.json", "fit_scale.json", "eval.json"):
        assert read_json(directory / name) == read_json(finished / name), name
    for stage in ("align", "distill", "finetune"):
        assert stage_records(directory / stage) == stage_records(finished / stage)
