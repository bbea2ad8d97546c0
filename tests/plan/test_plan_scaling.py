"""`hypenet scaling` runs real steps on subsets of the devices here."""

import json

import pytest
from test_plan_cpu import CONFIG

from hypenet_jax.cli import main
from hypenet_jax.plan.trace import _covered


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
    assert (tmp_path / "scaling.html").read_text().count("<svg") == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--meshes", "fsdp=16"], "a mesh has 16 devices and there are 8 here"),
        (["--meshes", "fsdp=-1"], "has size -1; a mesh of a list needs all its sizes"),
        (["--meshes", "fsdp=2", "--steps", "0"], "steps is 0"),
    ],
)
def test_mistakes(config_file, capsys, words, sentence):
    assert main(["scaling", "--config", str(config_file), *words]) == 2
    assert sentence in capsys.readouterr().err


def test_what_lies_within_another_counts_once():
    assert _covered([(0, 10), (2, 5), (8, 12), (20, 21)]) == 13
    assert _covered([]) == 0
