"""Teacher and student may lie over the mesh by rules of their own; the losses stay."""

import shutil

import pytest

from hypenet_jax.cli import main
from hypenet_jax.config import load_config
from hypenet_jax.halo import pipeline

MESH = ["--set", "mesh={'fsdp': 4, 'tensor': 2}"]


def test_a_teacher_whole_over_fsdp(finished, convert_config, tmp_path, stage_records, monkeypatch):
    copy, seen, train = tmp_path / "run", {}, pipeline.train
    shutil.copytree(finished, copy, ignore=lambda _, names: {*names} & {"distill", "finetune", "export", "eval.json"})
    monkeypatch.setattr(pipeline, "train", lambda **given: seen.update(given) or train(**given))
    flags = [*MESH, "--set", "teacher_rules.embed=[]", "--set", "rules.mlp=[]"]
    assert main(["distill", "--config", str(convert_config), "--workdir", str(copy), *flags]) == 0
    teacher, student = (tree["layer_0"]["mlp"]["up"] for tree in (seen["frozen"], seen["param_shardings"]))
    assert tuple(teacher.sharding.spec) == (None, "tensor") and tuple(student.spec) == ("fsdp", None)
    for got, wanted in zip(stage_records(copy / "distill"), stage_records(finished / "distill"), strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("teacher_rules.embde=[]", ["'teacher_rules'", "'embde'", "vocab, embed"]),
        ("rules.batch=['data']", ["'rules'", "'batch'", "no parameter"]),
        ("rules.embed=['expert']", ["'rules'", "'expert'", "the mesh has data, fsdp"]),
        ("teacher_rules.embed=['tensor']", ["'teacher_rules'", "embedding", "'vocab' and 'embed'", "'tensor'"]),
        ("teacher_rules.head_dim=['data', 'fsdp', 'seq']", ["'teacher_rules'", "both split over mesh axis 'fsdp'"]),
        ("rules.norm=['fsdp', 'data', 'tensor', 'seq', 'seq']", ["'rules'", "'seq'"]),
    ],
)
def test_a_mistake_names_the_axis(convert_config, tmp_path, capsys, setting, words):
    line = ["distill", "--config", str(convert_config), "--workdir", str(tmp_path / "run"), *MESH, "--set", setting]
    assert main(line) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said, said
    assert not (tmp_path / "run").exists()


def test_rules_are_read_from_a_config(convert_config):
    assert load_config(convert_config, ["teacher_rules.embed=[]"]).teacher_rules == {"embed": ()}
