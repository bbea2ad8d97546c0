"""A run of several processes: killed, preempted, and resumed by another number of them on another mesh."""

import json
import math
import pathlib
import random
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest
from toy_training import Interrupted, Stream, make_stage, records, run

from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.parallel.processes import EXIT_LOST
from hypenet_jax.train.checkpoint import load_params, read_latest
from hypenet_jax.train.preemption import EXIT_PREEMPTED

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "parallel"))

from process_runs import codes, said, started, wait_for_lines  # noqa: E402

# JAX ends a process itself (SIGABRT) where its coordinator has died.
ABORTED = -signal.SIGABRT
MANY = 100_000


def start(directory, axes, processes, steps, devices=1, stop=0):
    command = [str(HERE / "processes_toy.py"), str(directory), json.dumps(axes), str(steps), str(stop)]
    return started(command, processes, directory.parent / f"{directory.name}-logs", devices, paths=[HERE])


def in_this_process(directory, axes, last):
    """Trains until step `last` is written, and stops there as a run that is cut off."""
    mesh = make_mesh(axes, jax.devices()[: math.prod(axes.values())])
    stage = make_stage(steps=MANY, log_every=1, checkpoint_every=5, schedule="constant")
    with pytest.raises(Interrupted):
        run(directory, stage, mesh=mesh, sharded=True, stream=Stream(fail_at=last + 1))
    return records(directory)[:last]


def assert_like(got, wanted, rel=2e-5):
    assert [record["step"] for record in got] == [record["step"] for record in wanted]
    for a, b in zip(got, wanted, strict=True):
        assert a["count"] == b["count"], "another batch"
        assert a["loss"] == pytest.approx(b["loss"], rel=rel)


@pytest.mark.parametrize(
    ("axes", "victim"), [({"fsdp": 2}, 1), ({"data": 2, "tensor": 2}, 0)], ids=["2 processes", "4 processes"]
)
def test_one_is_killed_and_all_end_and_another_mesh_goes_on(tmp_path, axes, victim):
    directory, logs = tmp_path / "killed", tmp_path / "killed-logs"
    with start(directory, axes, math.prod(axes.values()), MANY) as running:
        wait_for_lines(directory / "metrics.jsonl", 12)
        time.sleep(random.uniform(0, 0.5))
        running[victim].send_signal(signal.SIGKILL)
        ended = codes(running, 60)
    assert ended.pop(victim) == -signal.SIGKILL
    assert set(ended) <= {EXIT_LOST, ABORTED}, said(logs)
    assert "has lost another process" in said(logs) or "another task died" in said(logs)
    shutil.copytree(directory, tmp_path / "same")
    latest = read_latest(directory)  # None where the kill came before the first save was complete
    last = 3 + (latest["step"] if latest else 0)
    here, same = in_this_process(directory, {"fsdp": 1}, last), in_this_process(tmp_path / "same", axes, last)
    assert_like(here, same)
    # On the mesh that the processes had, it is as if nothing had happened.
    assert same == in_this_process(tmp_path / "whole", axes, last)


@pytest.mark.parametrize(
    ("point", "victim"),
    [("hypenet_jax.train.loop:place_batch", 1), ("orbax.checkpoint:PyTreeCheckpointHandler.async_save", 0)],
    ids=["before the first step", "in the first save"],
)
def test_wherever_one_dies_the_other_ends_within_a_minute(tmp_path, point, victim):
    directory, logs = tmp_path / "run", tmp_path / "logs"
    toy = [str(HERE / "processes_toy.py"), str(directory), json.dumps({"fsdp": 2}), str(MANY), "0"]
    command = [str(HERE.parent / "parallel" / "killed_at.py"), point, "1", str(victim), *toy]
    with started(command, 2, logs, paths=[HERE]) as running:
        assert running[victim].wait(timeout=240) == -signal.SIGKILL, said(logs)
        assert codes(running, 60)[1 - victim] in (EXIT_LOST, ABORTED), said(logs)
    assert "has lost another process" in said(logs) or "another task died" in said(logs)
    assert read_latest(directory) is None


def test_sigterm_to_one_saves_in_all_and_one_process_goes_on_to_the_bit(tmp_path):
    directory, logs, axes = tmp_path / "run", tmp_path / "run-logs", {"fsdp": 2, "tensor": 2}
    with start(directory, axes, 2, MANY, devices=2) as running:
        wait_for_lines(directory / "metrics.jsonl", 3)
        running[1].send_signal(signal.SIGTERM)
        assert codes(running, 60) == [EXIT_PREEMPTED] * 2, said(logs)
    assert said(logs).count("saved; the same command continues") == 1
    stopped = records(directory)[-1]["step"]
    assert read_latest(directory)["step"] == stopped
    got = in_this_process(directory, axes, stopped + 4)
    assert got == in_this_process(tmp_path / "whole", axes, stopped + 4)


def test_four_processes_go_on_where_one_stopped(tmp_path):
    directory, axes = tmp_path / "run", {"fsdp": 2, "tensor": 2}
    in_this_process(directory, {"fsdp": 1}, 7)
    with start(directory, axes, 4, MANY, stop=12) as running:
        assert codes(running, 120) == [0] * 4, said(tmp_path / "run-logs")
    # No step may have to wait for a connection: Gloo does so for 30 seconds, and compiling may take longer.
    before, after = (tmp_path / "run-logs" / "0.log").read_text().split("toy: continuing from step 5", 1)
    assert "[Gloo]" in before and "[Gloo]" not in after
    assert_like(records(directory)[:12], in_this_process(tmp_path / "whole", axes, 12))
    got, wanted = load_params(directory)[1], load_params(tmp_path / "whole")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)
