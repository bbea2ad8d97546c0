"""`hypenet bench train` runs real steps on the devices here and says what it measured, by which peak."""

import json

import jax
import numpy as np
import pytest
from test_plan_cpu import CONFIG

from hypenet_jax.cli import main
from hypenet_jax.config import load_config
from hypenet_jax.data.batches import StageBatches
from hypenet_jax.hub.published import config_of
from hypenet_jax.plan import bench, flops, machines
from hypenet_jax.plan.running import random_arrays
from hypenet_jax.plan.stages import work_of
from hypenet_jax.plan.synthetic import mean_span, random_pack


@pytest.fixture(scope="module")
def config_file(byte_teacher, tmp_path_factory):
    """The teacher is a directory with a config.json and no weights."""
    directory = tmp_path_factory.mktemp("bench")
    (directory / "teacher").mkdir()
    (directory / "teacher/config.json").write_text((byte_teacher / "config.json").read_text())
    (directory / "config.py").write_text(CONFIG.format(teacher=directory / "teacher"))
    return directory / "config.py"


def test_the_command_measures_and_writes(config_file, tmp_path, capsys):
    words = ["bench", "train", "--config", str(config_file), "--steps", "3", "--documents", "8", "0"]
    assert main([*words, "--stage", "align", "distill", "--json", str(tmp_path / "b.json")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "a float32 product of side 1024, measured" in said[0] and said[1].split()[:2] == ["stage", "rows"]
    assert [line.split()[:5] for line in said[2:]] == [
        ["align", "16", "x", "32", "8"], ["align", "16", "x", "32", "whole"],
        ["distill", "16", "x", "32", "8"], ["distill", "16", "x", "32", "whole"],
    ]  # fmt: skip
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["versions"]["jax"] and result["peak"]["flops"] > 0
    config = load_config(config_file)
    teacher = config_of(config.teacher)
    for row in result["rows"]:
        assert row["steps"] == len(row["step_seconds_all"]) == len(row["losses"]) == 3
        assert row["tokens_per_second"] == pytest.approx(512 / sorted(row["step_seconds_all"])[1])
        assert 0 < row["input_share"] < 1 and None not in row["losses"]
        assert (row["span"] == 32) == (row["documents"] == 0) and row["span"] > 2
        student = bench.trained_student(row["stage"], config, teacher).config
        asked = flops.model_flops(row["stage"], teacher, student, row["span"])
        rate = row["tokens_per_second"] / result["devices"]
        assert row["mfu"] == pytest.approx(asked * rate / result["peak"]["flops"]) and row["hfu"] > row["mfu"]
        memory = row["memory"]
        # On one device of the eight lie an eighth of the batch and of most parameters.
        assert memory["compiled_bytes"] > memory["temporary_bytes"] > 0
        assert memory["argument_bytes"] >= sum(memory["parts_bytes"].values()) / 2
    assert [row["frozen_parameters"] > row["trained_parameters"] for row in result["rows"]] == [
        True,
        True,
        False,
        False,
    ]


def test_devices_with_figures():
    assert machines.chip_of("NVIDIA H100 80GB HBM3").flops == 989e12
    assert machines.chip_of("TPU v5 lite") is machines.V5E and machines.chip_of("NVIDIA H100 PCIe") is None


def test_what_does_not_fit_is_said_and_the_rest_measured(config_file, capsys, monkeypatch):
    real = bench.random_arrays

    def full(tree, seed):
        if "opt_state" in tree and "embedding" in tree["params"]:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes.")
        return real(tree, seed)

    monkeypatch.setattr(bench, "random_arrays", full)
    words = ["bench", "train", "--config", str(config_file), "--steps", "1", "--stage", "distill", "align"]
    assert main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert "does not fit: RESOURCE_EXHAUSTED" in said[2] and said[3].startswith("align") and "%" in said[3]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--documents", "-3"], "documents is -3; it must be at least 0"),
        (["--set", "distill.batch_size=3"], "batch_size 3 in 1 microbatches gives 3 rows"),
        (["--json", "nowhere/b.json"], "cannot write nowhere/b.json"),
        (["--set", "teacher=qwen9"], "there is no model at qwen9"),
    ],
)
def test_mistakes(config_file, capsys, words, sentence):
    assert main(["bench", "train", "--config", str(config_file), "--stage", "distill", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_random_weights_have_signs_and_moments_have_none(config_file):
    from hypenet_jax.parallel.mesh import make_mesh

    config = load_config(config_file)
    work = work_of("finetune", config, config_of(config.teacher), make_mesh(None))
    state = random_arrays(work.arguments[0], 0)
    q = np.asarray(state["params"]["layer_0"]["mixer"]["q"])
    assert 0.3 < (q < 0).mean() < 0.7 and q.std() == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(q, np.asarray(state["params"]["layer_0"]["mixer"]["gate"]))
    moments = random_arrays({"opt_state": work.arguments[0]["params"]}, 0)["opt_state"]
    assert (np.asarray(moments["layer_0"]["mixer"]["q"]) >= 0).all()


@pytest.mark.parametrize("mean", [7, None])
def test_random_text_is_documents_over_the_whole_vocabulary(tmp_path, mean):
    packed = random_pack(tmp_path / "pack", 300, 32, mean, 4000)
    batches = StageBatches(packed, seq_len=32, batch_size=20, start_token=0, steps=4, seed=0)
    seen = [next(batches) for _ in range(4)]
    batches.close()
    tokens = np.concatenate([batch["tokens"].ravel() for batch in seen])
    assert tokens.min() >= 0 and tokens.max() == 299 and len(np.unique(tokens)) > 280
    span = mean_span([batch["segment_ids"] for batch in seen])
    # A token is likelier to lie in a longer document: twice the mean for lengths without an end, less within rows.
    assert span == 32 if mean is None else 7 < span < 14
    assert mean is None or packed.info.tokens / packed.info.documents == pytest.approx(7, rel=0.15)


def test_span_by_hand():
    rows = np.array([[0, 0, 0, 1], [-1, 2, 2, -1]])
    assert mean_span([rows]) == pytest.approx((9 + 1 + 4) / 6)
    assert mean_span([rows[:, :0]]) == 0
