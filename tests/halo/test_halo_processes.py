"""`hypenet convert` and `pretrain` as several processes: the numbers of one, everything written once."""

import pathlib
import shutil
import signal
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from hypenet_jax.cli import main
from hypenet_jax.halo.workdir import read_json

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "parallel"))

from process_runs import codes, said, started, wait_for_words  # noqa: E402


def hypenet(command, config, directory, processes, *flags):
    """What all processes said, after they ended well."""
    logs = directory.parent / f"{directory.name}-logs"
    line = ["-m", "hypenet_jax.cli", command, "--config", str(config), "--workdir", str(directory), *flags]
    with started(line, processes, logs) as running:
        assert codes(running) == [0] * processes, said(logs)
    return said(logs)


def assert_like(got, wanted, stage_records, stages):
    for stage in stages:
        pairs = zip(stage_records(got / stage), stage_records(wanted / stage), strict=True)
        for a, b in pairs:
            assert a["count"] == b["count"] and a["step"] == b["step"]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    weights, others = (load_file(run / "export" / "model.safetensors") for run in (got, wanted))
    assert weights.keys() == others.keys()
    for name, array in weights.items():
        assert np.linalg.norm(array - others[name]) <= 1e-5 * np.linalg.norm(others[name]), name


def test_two_processes_convert_as_one(finished, convert_config, tmp_path, stage_records):
    told = hypenet("convert", convert_config, tmp_path / "run", 2, "--set", "evaluate.prompts=[]")
    assert told.count("packing") == told.count("the report is") == told.count("align  step 5/5") == 1
    assert_like(tmp_path / "run", finished, stage_records, ("align", "distill", "finetune"))
    got, wanted = (read_json(run / "select.json") for run in (tmp_path / "run", finished))
    assert got["layers"] == wanted["layers"] and got["recall"] == wanted["recall"] and got["csr"] == wanted["csr"]
    assert got["kl"] == pytest.approx(wanted["kl"], rel=1e-5)
    got, wanted = (read_json(run / "fit_scale.json") for run in (tmp_path / "run", finished))
    assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-5) and got["a"] == pytest.approx(wanted["a"], rel=1e-3)
    got, wanted = (read_json(run / "eval.json")["models"] for run in (tmp_path / "run", finished))
    for name, model in wanted.items():
        assert got[name]["perplexity"] == pytest.approx(model["perplexity"], rel=1e-5)
    assert read_json(tmp_path / "run" / "run.json")["processes"] == 2
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith((".tmp", ".partial"))]


def test_two_processes_ablate_as_one(finished, convert_config, tmp_path):
    sizes = {"seeds": 2, "distill_steps": 2, "measure_every": 1, "heldout_rows": 3}
    flags = ["--study", "documents", *(word for k, v in sizes.items() for word in ("--set", f"ablate.{k}={v}"))]
    curves = []
    for processes in (1, 2):
        directory = tmp_path / str(processes)
        shutil.copytree(finished, directory)
        hypenet("ablate", convert_config, directory, processes, *flags)
        cells = sorted((directory / "studies" / "documents" / "cells").iterdir())
        curves.append([point[key] for cell in cells for point in read_json(cell)["distill"] for key in ("kl", "nll")])
    assert len(curves[0]) == 2 * 2 * 3 * 2
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


PRETRAIN = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.dtype, config.mesh = "float32", {{"fsdp": -1, "tensor": 2}}
    config.model = dict(
        hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
        attention_layers=(), position="hype",
    )
    config.data = dict(sources=({documents!r},), heldout_share=0.3)
    config.train = dict(
        steps=3, batch_size=4, seq_len=64, peak_lr=1e-2, end_lr=1e-4, warmup_steps=1, log_every=1, checkpoint_every=2,
    )
    config.evaluate = dict(tasks=(), perplexity_length=128, perplexity_documents=2, batch_tokens=1024)
    return config
"""


def test_four_processes_train_from_scratch_as_one(documents_file, tmp_path, stage_records, capsys):
    program = tmp_path / "scratch.py"
    program.write_text(PRETRAIN.format(documents=str(documents_file)))
    hypenet("pretrain", program, tmp_path / "run", 4)
    assert main(["pretrain", "--config", str(program), "--workdir", str(tmp_path / "one")]) == 0
    assert_like(tmp_path / "run", tmp_path / "one", stage_records, ("train",))
    got, wanted = (read_json(tmp_path / run / "eval.json")["models"]["model"] for run in ("run", "one"))
    assert got["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-5)


def test_sigterm_to_one_ends_the_evaluation_of_all_and_what_was_asked_stays(documents_file, tmp_path):
    program, directory, logs = tmp_path / "scratch.py", tmp_path / "run", tmp_path / "logs"
    program.write_text(PRETRAIN.format(documents=str(documents_file)))
    cells = ("tasks=('S1',)", f"lengths={list(range(500, 515))}", "samples=2", "answer_budget=16")
    sets = [word for cell in cells for word in ("--set", f"evaluate.{cell}")]
    line = ["-m", "hypenet_jax.cli", "pretrain", "--config", str(program), "--workdir", str(directory), *sets]
    with started(line, 2, logs) as running:
        wait_for_words(logs / "0.log", "evaluate  perplexity")
        running[1].send_signal(signal.SIGTERM)
        assert codes(running, 60) == [75, 75], said(logs)
    assert said(logs).count("evaluate: stopped and saved; the same command continues") == 1
    found = read_json(directory / "eval.json")
    assert found["models"] == {} and len(found["begun"]["model"]["cells"]) < 15


def test_a_mistake_ends_all_processes_at_once(convert_config, tmp_path):
    directory, logs = tmp_path / "run", tmp_path / "logs"
    directory.mkdir()
    (directory / "diary.txt").write_text("mine")
    line = ["-m", "hypenet_jax.cli", "align", "--config", str(convert_config), "--workdir", str(directory)]
    with started(line, 2, logs) as running:
        assert codes(running, 60) == [2, 2], said(logs)
    assert "holds something else" in (logs / "0.log").read_text()
    assert [path.name for path in directory.iterdir()] == ["diary.txt"]
