"""`hypenet scaling` runs real steps on subsets of the devices here."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from test_plan_cpu import CONFIG

from hypenet_jax.cli import main
from hypenet_jax.config import load_config
from hypenet_jax.plan import scaling as module
from hypenet_jax.plan.trace import _covered

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/parallel"))

from process_runs import codes, said, started  # noqa: E402


@pytest.fixture(scope="module")
def config_file(byte_teacher, tmp_path_factory):
    file = tmp_path_factory.mktemp("scaling") / "config.py"
    file.write_text(CONFIG.format(teacher=byte_teacher))
    return file


@pytest.mark.parametrize("weak", [False, True], ids=["strong", "weak"])
def test_two_meshes(config_file, tmp_path, capsys, weak):
    words = ["scaling", "--config", str(config_file), "--meshes", "fsdp=1", "fsdp=2", "--steps", "2"]
    words += ["--stage", "finetune", "--json", str(tmp_path / "s.json"), "--out", str(tmp_path)]
    assert main(words + ["--weak"] * weak) == 0
    said = capsys.readouterr().out
    assert ("weak scaling" if weak else "strong scaling") in said and "one device" in said
    one, two = json.loads((tmp_path / "s.json").read_text())
    assert [(r["devices"], r["rows"]) for r in (one, two)] == [(1, 16), (2, 32 if weak else 16)]
    assert one["efficiency"] == 1.0 and two["efficiency"] > 0
    assert one["collective_seconds"] == 0 < two["collective_seconds"]
    assert one["compute_seconds"] > 0 and one["step_seconds"] > 0
    assert len(one["losses"]) == len(one["gradient_norms"]) == 2 + 2 + 2  # warm-up, in place, fed
    assert (two["loss_difference"] is None) == weak
    assert (tmp_path / "scaling.html").read_text().count("<svg") == 2


def test_losses_are_compared_with_the_smallest_mesh(config_file, tmp_path):
    words = ["scaling", "--config", str(config_file), "--meshes", "fsdp=2", "fsdp=1", "data=2,seq=2,tensor=2"]
    assert main([*words, "--steps", "1", "--json", str(tmp_path / "s.json")]) == 0
    two, one, eight = json.loads((tmp_path / "s.json").read_text())
    assert one["loss_difference"] == one["norm_difference"] == 0 and len(set(one["losses"])) == 4
    for record in (two, eight):
        differences = [abs(a / b - 1) for a, b in zip(record["losses"], one["losses"], strict=True)]
        assert record["loss_difference"] == pytest.approx(max(differences), rel=1e-6) and max(differences) < 1e-5
        assert record["norm_difference"] < 1e-4
    assert eight["norm_difference"] > 0


def test_rows_of_more_devices_take_fewer_microbatches(config_file):
    config = load_config(config_file, ["distill.gradient_accumulation=4", "distill.batch_size=32"])
    meshes = ["fsdp=1", "fsdp=2", "seq=2", "data=2,fsdp=4", "tensor=2,fsdp=2"]
    cells = module._cells(config, meshes, "distill", weak=False)
    assert [cell.config.distill.gradient_accumulation for cell in cells] == [4, 2, 4, 1, 2]
    assert {cell.config.distill.batch_size for cell in cells} == {32}
    weak = module._cells(config, meshes, "distill", weak=True)
    assert {cell.config.distill.gradient_accumulation for cell in weak} == {4}


def test_several_processes_measure_together_and_one_writes(config_file, tmp_path):
    """Meshes of one process's device and of two processes'; the others wait."""
    words = ["--config", str(config_file), "--meshes", "fsdp=1", "fsdp=2", "--steps", "1", "--stage", "finetune"]
    words += ["--json", str(tmp_path / "s.json"), "--out", str(tmp_path)]
    with started(["-m", "hypenet_jax.cli", "scaling", *words], 3, tmp_path / "logs") as running:
        assert codes(running) == [0] * 3, said(tmp_path / "logs")
    records = json.loads((tmp_path / "s.json").read_text())
    assert [record["devices"] for record in records] == [1, 2]
    assert records[0]["collective_seconds"] == 0 < records[1]["collective_seconds"]
    assert all(record["loss_difference"] < 1e-5 and record["compute_seconds"] > 0 for record in records)
    assert (tmp_path / "scaling.html").read_text().count("<svg") == 2
    logs = [(tmp_path / f"logs/{number}.log").read_text() for number in range(3)]
    assert "tokens/s" in logs[0] and not any("tokens/s" in log for log in logs[1:])


def test_a_run_that_is_cut_off_keeps_what_it_has_measured(config_file, tmp_path, monkeypatch):
    measure, calls = module._measure, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(module, "_measure", interrupted)
    words = ["scaling", "--config", str(config_file), "--meshes", "fsdp=2", "fsdp=1", "fsdp=4", "--steps", "1"]
    words += ["--json", str(tmp_path / "new/s.json"), "--out", str(tmp_path / "page")]
    assert main(words) == 130
    two, one = json.loads((tmp_path / "new/s.json").read_text())
    assert (two["devices"], one["devices"], one["efficiency"]) == (2, 1, 1.0) and two["efficiency"] != 1.0
    assert (tmp_path / "page/scaling.html").read_text().count("<tr>") == 3
    # The same command may follow: what is there is its own.
    calls.append(None)
    assert main([*words[:3], "--meshes", "fsdp=1", *words[7:]]) == 0
    assert len(json.loads((tmp_path / "new/s.json").read_text())) == 1


def test_sigterm_ends_it_at_once_and_what_was_measured_is_there(config_file, tmp_path):
    file = tmp_path / "s.json"
    meshes = ["fsdp=1", *(f"{axis}={size}" for size in (2, 4, 8) for axis in ("data", "fsdp"))]
    words = ["scaling", "--config", str(config_file), "--meshes", *meshes, "--json", str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-m", "hypenet_jax.cli", *words], env=environment, stderr=subprocess.PIPE, text=True
    ) as running:
        deadline = time.monotonic() + 120
        while not file.exists() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        running.terminate()
        # As a shell writes it: 143.
        assert running.wait(30) == -signal.SIGTERM and "Traceback" not in running.stderr.read()
    assert 1 <= len(json.loads(file.read_text())) < len(meshes)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--meshes", "fsdp=1", "fsdp=16"], "mesh 'fsdp=16' has 16 devices and there are 8 here"),
        (["--meshes", "fsdp=1", "fsdp=999999999"], "has 999999999 devices and there are 8 here"),
        (["--meshes", "fsdp=1", "fsdp=-1"], "mesh 'fsdp=-1': mesh axis 'fsdp' has size -1; a mesh of a list needs all"),
        (["--meshes", "fsdp=1", "foo=2"], "mesh 'foo=2': mesh axis 'foo' is unknown"),
        (["--meshes", "fsdp=1", "fsdp=3"], "mesh 'fsdp=3': batch_size 16 in 1 microbatches gives 16 rows, which do"),
        (["--meshes", "fsdp=4", "fsdp=3", "--weak"], "mesh 'fsdp=4': 16 rows on 3 devices do not grow evenly to 4"),
        (["--meshes", "fsdp=1", "tensor=8"], "mesh 'tensor=8': "),
        (["--meshes", "fsdp=2", "--steps", "0"], "steps is 0"),
        (["--meshes", "fsdp=1", "--json", "/proc/no/s.json"], "/proc/no cannot be a directory"),
        (["--meshes", "fsdp=1", "--json", ""], "--json is empty; name a file"),
        (["--meshes", "fsdp=1", "--json", "/"], "/ is a directory; name a file for the records"),
        (["--meshes", "fsdp=1", "--json", "/proc/s.json"], "/proc cannot be written to"),
        (["--meshes", "fsdp=1", "--json", "mine/notes"], "mine/notes exists and holds something else"),
        (["--meshes", "fsdp=1", "--out", "mine"], "mine/scaling.html exists and is not a page of this command"),
        (["--meshes", "fsdp=1", "--out", "mine/notes"], "mine/notes"),
        (["--meshes", "fsdp=1", "--json", "new/s.json", "--out", "mine"], "mine/scaling.html exists"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_measured(
    config_file, tmp_path, monkeypatch, capsys, words, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("mine")
    (tmp_path / "mine/scaling.html").write_text("<html>mine")
    monkeypatch.setattr(module, "_measure", lambda *a: pytest.fail("measured"))
    assert main(["scaling", "--config", str(config_file), *words]) == 2
    told = capsys.readouterr()
    assert sentence in told.err and len(told.err.splitlines()) == 1 and not told.out
    assert (tmp_path / "mine/notes").read_text() == "mine" and not (tmp_path / "new").exists()


def test_what_lies_within_another_counts_once():
    assert _covered([(0, 10), (2, 5), (8, 12), (20, 21)]) == 13
    assert _covered([]) == 0
