"""A teacher's output that several processes write and learn from: the records and the losses of one process."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest

from hypenet_jax.cli import main
from hypenet_jax.data.teacher_rows import TeacherRows

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "parallel"))

from process_runs import codes, said, started  # noqa: E402

FORMS = {"hidden": (), "top-k": ("--form", "top-k", "--k", "8")}
# Written on one mesh and read on the other: under seq every process holds a part of every row.
MESHES = {"hidden": ("fsdp=2", "seq=2"), "top-k": ("seq=2", "fsdp=2")}


def aligned(finished, directory):
    """A copy of the finished run as it stood before stage 2."""
    unwanted = {"distill", "finetune", "export", "eval.json"}
    return shutil.copytree(finished, directory, ignore=lambda _, names: {*names} & unwanted)


def lines(config, directory, form, written="fsdp=1", read="fsdp=1"):
    """The arguments of cache-teacher and of distill, on these meshes."""
    run = ["--config", str(config), "--workdir", str(directory), "--set"]
    output = f"teacher_output={directory / 'teacher_output'}"
    cache = ["cache-teacher", *run, f"mesh.{written}", *FORMS[form]]
    return cache, ["distill", *run, f"mesh.{read}", "--set", output]


@pytest.mark.parametrize("form", FORMS)
def test_records_and_losses_are_those_of_one_process(
    finished, convert_config, tmp_path, stage_records, on_one_device, form
):
    """Two processes write the output, learn from it, and the last step again from the checkpoint before it."""
    run, again, one = aligned(finished, tmp_path / "two"), tmp_path / "again", aligned(finished, tmp_path / "one")
    cache, distill = lines(convert_config, run, form, *MESHES[form])
    resumed = [str(again) if argument == str(run) else argument for argument in distill]
    commands = [cache, distill, ["copy", str(run), str(again), "distill/checkpoints/5"], resumed]
    with started([str(HERE / "commands_in_turn.py"), json.dumps(commands)], 2, tmp_path / "logs") as running:
        assert codes(running, 600) == [0, 0], said(tmp_path / "logs")
    assert said(tmp_path / "logs").count("distill: continuing from step 4 of 5") == 1
    for line in lines(convert_config, one, form):
        assert main(line) == 0
    got, wanted = (TeacherRows(directory / "teacher_output")(np.arange(20)) for directory in (run, one))
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
    records = stage_records(run / "distill")
    assert_like(records, stage_records(one / "distill"))
    if form == "hidden":
        assert_like(records, stage_records(finished / "distill"))  # of the live teacher
    assert stage_records(again / "distill") == records


def assert_like(got, wanted):
    assert [record["step"] for record in got] == [record["step"] for record in wanted] == [1, 2, 3, 4, 5]
    for a, b in zip(got, wanted, strict=True):
        assert a["count"] == b["count"], "another batch"
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
