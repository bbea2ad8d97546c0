"""Teacher and student may lie over the mesh by rules of their own; the losses stay."""

import shutil

import pytest

from hypenet_jax.cli import main
from hypenet_jax.config import load_config
from hypenet_jax.halo import pipeline
from hypenet_jax.halo.workdir import read_json

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


def numbers(tree, where=""):
    """{path: number or word} of JSON, without times."""
    if isinstance(tree, dict):
        pairs = [pair for pair in tree.items() if pair[0] != "seconds"]
    elif isinstance(tree, list):
        pairs = list(enumerate(tree))
    else:
        return {where: tree}
    return {path: leaf for name, branch in pairs for path, leaf in numbers(branch, f"{where}/{name}").items()}


def test_selection_and_evaluation_on_a_mesh_of_rows_positions_and_heads(finished, convert_config, tmp_path):
    """Questions, needles, perplexity by position and what the models write are those of one device."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy, ignore=lambda _, names: {*names} & {"select.json", "select", "eval.json"})
    for step in ("select", "evaluate"):
        flags = ["--set", "mesh={'data': 2, 'seq': 2, 'tensor': 2}"]
        assert main([step, "--config", str(convert_config), "--workdir", str(copy), *flags]) == 0
    for file in ("select.json", "eval.json"):
        got, wanted = (numbers(read_json(directory / file)) for directory in (copy, finished))
        assert len(wanted) > 10 and got.keys() == wanted.keys()
        for path, value in wanted.items():
            close = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
            assert got[path] == close, path


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
