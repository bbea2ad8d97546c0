"""The real TPU compiler on two layers, one Lightning and one attention, divided by tensor and by seq: what travels."""

import importlib.util
import json
import math
import re

import pytest
from absent_machines import D, layer_matrices, run, write_conversion

from hypenet_jax.config import load_config
from hypenet_jax.hub.published import config_of
from hypenet_jax.plan.machines import APART
from hypenet_jax.plan.stages import models

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and not (APART / "libtpu").is_dir(),
    reason="libtpu is not installed (make aot)",
)

LAYERS, V, HEADS, KV_HEADS, HEAD = 2, 4096, 4, 2, 128


def planned(directory, stage, topology, mesh, rows, length):
    """The record of a stage of so many rows, and the entries of the layers' matrices of teacher and student."""
    file, config_file = directory / "plan.json", write_conversion(directory, LAYERS, V)
    changes = ["student.attention_layers=(1,)", f"{stage}.batch_size={rows}", f"{stage}.seq_len={length}"]
    words = ["--topology", topology, "--mesh", mesh, "--stages", stage, "--json", str(file)]
    done = run("--config", str(config_file), *words, *(word for change in changes for word in ("--set", change)))
    assert done.returncode == 0, done.stderr[-2000:]
    [record] = json.loads(file.read_text())
    config = load_config(config_file, changes)
    return record, *(sum(layer_matrices(model)) for model in models(config, config_of(config.teacher)))


def bytes_of(record, axes, kinds, least, most=math.inf):
    """Bytes of the arrays of these collectives over exactly these axes, of sizes from `least` to below `most`."""
    found = [c for c in record["collectives"] if c["axes"] == axes and c["kind"] in kinds and least <= c["size"] < most]
    return sum(one["size"] * one["count"] for one in found)


def dims(record):
    """The shapes of the largest arrays."""
    return [[int(n) for n in re.search(r"\[(.*)\]", name)[1].split(",")] for name in record["largest"]]


def test_distillation_divided_by_fsdp_and_tensor(tmp_path):
    rows, length = 4, 640
    record, teacher, student = planned(tmp_path, "distill", "v5e-4", "fsdp=2,tensor=2", rows, length)
    small, hidden = 16 * 1024, rows // 2 * length * D * 2
    # Sums over tensor are of hidden states in bfloat16: after both halves of a layer forward, of teacher and student;
    # after the mixer again for the second forward pass; of both halves' gradients; of the loss's; and the looked-up
    # rows of the vocabulary, the student's in float32.
    sums = bytes_of(record, ["tensor"], {"all-reduce"}, small)
    assert sums == (2 + 2 + 1 + 2) * LAYERS * hidden + (1 + 1 + 2) * hidden
    # Of each matrix a half is gathered over fsdp: the teacher's once, the student's twice; and both heads.
    head = V * D // 2
    assert bytes_of(record, ["fsdp"], {"all-gather"}, small, 2 * head) == 2 * (teacher + 2 * student) / 2
    assert bytes_of(record, ["fsdp"], {"all-gather"}, 2 * head) == (2 + 4) * head
    # Their gradients go back in bfloat16, the head's in float32.
    back = {"reduce-scatter", "all-reduce", "collective-permute"}
    assert bytes_of(record, ["fsdp"], back, small) == pytest.approx(2 * student / 2 + 4 * head, rel=0.001)
    # Looked-up rows change from halves of the width to halves of the batch; the student's gradient back.
    assert bytes_of(record, ["fsdp"], {"all-to-all"}, small) == (1 + 2 + 2) * hidden
    # Nothing else is worth a word, and no gather is of more than a head.
    known = {
        ("all-reduce", "tensor"),
        ("all-gather", "fsdp"),
        ("all-to-all", "fsdp"),
        *((kind, "fsdp") for kind in back),
    }
    for one in record["collectives"]:
        assert one["size"] <= small or (one["kind"], "+".join(one["axes"])) in known, one
        assert one["kind"] != "all-gather" or one["size"] <= 4 * head
    # Neither a chip's [B, T, V] nor [T, T].
    for shape in dims(record):
        assert math.prod(shape) < rows // 2 * length * V // 2 and shape.count(length) < 2, shape


def test_finetuning_divided_by_seq(tmp_path):
    shards, length = 4, 8192
    record, _, student = planned(tmp_path, "finetune", "v5p-8", f"seq={shards}", 1, length)
    assert {axis for one in record["collectives"] for axis in one["axes"]} == {"seq"}
    small = 64 * 1024
    # The attention layer gathers keys and values of the row, for both forward passes, and sums their float32 gradients;
    # that is all that is gathered, parameters included.
    keys = length * KV_HEADS * HEAD
    assert bytes_of(record, ["seq"], {"all-gather"}, small) == 2 * 2 * 2 * keys
    # Each chip gets the sum of its own part of those alone.
    assert bytes_of(record, ["seq"], {"reduce-scatter"}, small) == 2 * 4 * keys
    # Gradients of the layers in bfloat16, of embedding and head in float32, each whole: nothing else is summed.
    assert bytes_of(record, ["seq"], {"all-reduce"}, small) == pytest.approx(2 * student + 2 * 4 * V * D, rel=1e-3)
    # The Lightning layer's states of two half-blocks, there and back, in both forward passes and the backward one.
    state = HEADS * HEAD * HEAD * 4
    assert bytes_of(record, ["seq"], {"all-to-all"}, small) == 3 * 2 * 2 * state
    # The last hidden states change their order, and their gradients: two half-blocks each.
    half_block = length // (2 * shards)
    assert bytes_of(record, ["seq"], {"collective-permute"}, small) == 2 * 2 * half_block * D * 2
    # No array has two axes as long as a half-block: neither [T, T] nor [T, V].
    for shape in dims(record):
        assert sum(size >= half_block for size in shape) < 2, shape
