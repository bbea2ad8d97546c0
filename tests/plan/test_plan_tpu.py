"""The real TPU compiler on a 4-layer HypeNet: collectives by kind and bytes, and memory within a bound."""

import importlib.util
import json
import os
import signal
import subprocess
import sys

import jax
import pytest
from absent_machines import (
    ROOT,
    D,
    V,
    check_one_layer_of_alignment,
    layer_matrices,
    run,
    write_conversion,
    write_pretraining,
)

from hypenet_jax.config import load_config
from hypenet_jax.hub.published import config_of
from hypenet_jax.plan.machines import APART
from hypenet_jax.plan.stages import models

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and not (APART / "libtpu").is_dir(),
    reason="libtpu is not installed (make aot)",
)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return write_conversion(tmp_path_factory.mktemp("tpu"))


def test_a_plan_that_is_stopped_says_nothing(config_file):
    command = [sys.executable, "-m", "hypenet_jax.cli", "plan", "--config", str(config_file), "--topology", "v5e-16"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert "v5e-16, 16 chips" in running.stdout.readline()
        running.terminate()
        assert running.wait(60) == -signal.SIGTERM and not running.stderr.read()


def test_four_layers_of_distillation_on_v5e_16(config_file, tmp_path):
    file = tmp_path / "plan.json"
    done = run("--config", str(config_file), "--topology", "v5e-16", "--stages", "distill", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    [record] = json.loads(file.read_text())
    assert record["fits"] and record["memory_bytes"] == 15.75 * 2**30
    config = load_config(config_file)
    teacher, student = models(config, config_of(config.teacher))

    # Every array of 16 devices is on one of them once: float32 masters and two moments, a bfloat16 teacher.
    trees = {"teacher": teacher.param_shapes(), "student": student.param_shapes()}
    entries = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in trees.items()}
    assert record["parts_bytes"]["parameters"] == pytest.approx(4 * entries["student"] / 16, rel=0.01)
    assert record["parts_bytes"]["optimizer"] == pytest.approx(8 * entries["student"] / 16, rel=0.01)
    assert record["parts_bytes"]["teacher"] == pytest.approx(2 * entries["teacher"] / 16, rel=0.01)

    # Matrices of the layers travel in bfloat16, one by one: the teacher's once, the student's for both forward passes.
    matrices = {"teacher": layer_matrices(teacher), "student": layer_matrices(student)}
    sent = {}
    for one in record["collectives"]:
        assert one["axes"] == ["fsdp"]
        if one["size"] < 2 * V * D:
            sent[one["kind"]] = sent.get(one["kind"], 0) + one["size"] * one["count"]
    travelling = 2 * (sum(matrices["teacher"]) + 2 * sum(matrices["student"]))
    assert sent["all-gather"] == pytest.approx(travelling, rel=0.02)
    # Their gradients go back as rings of parts, 17 hops for the 15 that a reduce-scatter takes.
    assert sent["collective-permute"] == pytest.approx(2 * sum(matrices["student"]), rel=0.2)
    # Larger than a matrix are the two heads' gathers and the sum of the trained head's gradient: of a head's size.
    large = [one for one in record["collectives"] if one["size"] >= 2 * V * D]
    assert {one["kind"] for one in large} == {"all-gather", "all-reduce"}
    for one in large:
        assert one["size"] / (V * D) == pytest.approx(2 if one["size"] < 3 * V * D else 4, rel=1e-3), one
    assert sum(one["count"] for one in large) <= 3

    # No [B, T, V], not even of a device's two rows: the largest is the gradient of 2048 tokens' logits.
    assert max(record["largest"].values()) == 2048 * V * 2 < 2 * 2048 * V * 2
    # Two heads (the trained one in both types), the gradient of one and its sum, the logits of 512 tokens of both
    # models, that buffer, and 96 MiB for all else.
    known = (4 + 2 + 2 + 4 + 4) * V * D + 2 * 512 * V * 4 + 2048 * V * 2
    assert record["temporary_bytes"] < known + 96 * 2**20
    assert record["tokens_per_second"][0] > 0 and record["chip_hours"][0] > 0


def test_alignment_holds_one_layer_at_a_time(config_file, tmp_path):
    file = tmp_path / "plan.json"
    done = run("--config", str(config_file), "--topology", "v5e-16", "--stages", "align", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    [record] = json.loads(file.read_text())
    check_one_layer_of_alignment(record, 32 * 2048 // 16)


def test_what_does_not_fit_is_said_with_what_to_change(tmp_path):
    sets = ("finetune.seq_len=16384", "finetune.batch_size=512", "remat=False", "student.attention_layers=()")
    words = [word for one in sets for word in ("--set", one)]
    config_file = write_conversion(tmp_path, layers=1)
    done = run("--config", str(config_file), "--topology", "v5e-4", "--stages", "finetune", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "does not fit, by" in done.stdout and "of 15.75 GiB" in done.stdout
    assert "remat=True is still short by" in done.stdout
    assert "what to change: --set remat=True --set finetune.gradient_accumulation=" in done.stdout
    assert "compiled)" in done.stdout


def test_training_from_scratch_on_v5e_4(tmp_path):
    file = tmp_path / "plan.json"
    words = ["--topology", "v5e-4", "--stages", "train", "decode", "--json", str(file)]
    done = run("--config", str(write_pretraining(tmp_path)), *words)
    assert done.returncode == 0, done.stderr[-2000:]
    train, decode = json.loads(file.read_text())
    assert (train["stage"], decode["stage"]) == ("train", "decode") and train["fits"] and decode["fits"]
    assert train["tokens_per_step"] == 16 * 1024 and train["tokens"] == 100 * 16 * 1024
    assert "teacher" not in train["parts_bytes"] and "the stage: 0.00164B tokens in 100 steps" in done.stdout
    assert train["parts_bytes"]["optimizer"] == pytest.approx(2 * train["parts_bytes"]["parameters"], rel=0.01)


def test_two_slices_sum_gradients_between_them(tmp_path):
    file, config_file = tmp_path / "plan.json", write_pretraining(tmp_path)
    words = ["--config", str(config_file), "--topology", "2xv5e-4", "--stages", "train"]
    done = run(*words, "--mesh", "fsdp=8")
    assert done.returncode == 2 and "the devices form 2 slices; make it 2" in done.stderr
    done = run(*words, "--set", "model.num_layers=1", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    [record] = json.loads(file.read_text())
    assert record["chips"] == 8 and record["mesh"] == {"dcn": 2, "fsdp": 4} and record["fits"]
    assert {tuple(one["axes"]) for one in record["collectives"] if one["kind"] != "all-reduce"} == {("fsdp",)}
    between = [one for one in record["collectives"] if one["axes"] == ["dcn"]]
    assert between and all(one["devices"] == 2 for one in between)
    # Each of the four chips of a slice sums its quarter with its like in the other: matrices in bfloat16; embedding and
    # head in float32, 257 rows filled up to 4 x 68 and as columns to 384; 5 KiB for norms and counts.
    matrices = 3 * 256 * 512 + 256 * 128 * (2 + 1 + 1 + 2)
    wanted = (2 * matrices + 4 * 256 * (4 * 68 + 384)) / 4
    assert wanted < sum(one["size"] * one["count"] for one in between) <= wanted + 5 * 1024
    sent = sum(one["sent"] for one in between)
    assert record["seconds"]["network"]["dcn"] == pytest.approx(sent / 3.125e9)


LAY_OUT = """
from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.parallel.presets import PRESETS, preset
from hypenet_jax.plan.machines import machine, open_devices, use_cpu
use_cpu(1)
tpus = [name for name in PRESETS if machine(name).platform == "tpu"]
sizes = {name: preset(name) for name in (*tpus, *(f"2x{name}" for name in tpus))} | {"v5p-128": {"fsdp": 2, "seq": 32}}
for name, axes in sizes.items():
    mesh = make_mesh(axes, open_devices(machine(name)))
    print(name, len(set(mesh.devices.flat)))
    # No axis but dcn leaves a slice.
    parts = mesh.devices if "dcn" in mesh.shape else [mesh.devices]
    assert all(len({getattr(device, "slice_index", 0) for device in part.flat}) == 1 for part in parts), name
"""


def test_every_presets_mesh_lies_on_its_machine():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LAY_OUT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1000:]
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found["v5e-256"] == "256" and found["v5p-8"] == "4" and found["v5p-128"] == "64" and len(found) > 16
    assert found["2xv5e-256"] == "512" and found["2xv5p-8"] == "8"
