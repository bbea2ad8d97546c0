"""What a plan over several stages, meshes and machines says: its table, totals, and combinations that do not divide."""

import dataclasses
import json

import pytest

from hypenet_jax.cli import main
from hypenet_jax.config import load_config
from hypenet_jax.plan import machines, planning
from hypenet_jax.plan.compile import FULL, QUICK, Compiled, little_room
from hypenet_jax.plan.machines import machine
from hypenet_jax.plan.plot import write_plan
from hypenet_jax.plan.remedies import remedy
from hypenet_jax.plan.table import COLUMNS, describe, overview, rows, totals

GIB = 2**30


@pytest.fixture(scope="module")
def config_file(byte_teacher, tmp_path_factory):
    """A conversion in three stages whose teacher is a directory with a config.json and no weights."""
    directory = tmp_path_factory.mktemp("sweep")
    (directory / "teacher").mkdir()
    (directory / "teacher/config.json").write_text((byte_teacher / "config.json").read_text())
    stage = "dict(steps=10, batch_size=16, seq_len=32, peak_lr=1e-3, end_lr=1e-5, warmup_steps=2)"
    values = {
        "teacher": repr(str(directory / "teacher")),
        "data": "dict(sources=('stdlib',))",
        "dtype": "'float32'",
        "student": "dict(attention_layers=(0,))",
        **{name: stage for name in ("align", "distill", "finetune")},
    }
    lines = "".join(f"    config.{name} = {value}\n" for name, value in values.items())
    program = "import ml_collections\ndef get_config():\n    config = ml_collections.ConfigDict()\n"
    (directory / "config.py").write_text(f"{program}{lines}    return config\n")
    return directory / "config.py"


def record(stage, mesh, hours, tokens=2e9, **more):
    return {
        "stage": stage, "machine": "v5e-16", "chips": 16, "mesh": mesh, "fits": True, "short_bytes": 0.0,
        "memory_bytes": 15.75 * GIB, "parts_bytes": {"parameters": GIB}, "compile_seconds": 3.0, "flops": 1e12,
        "steps": 10, "temporary_bytes": GIB, "code_bytes": 0.0, "total_bytes": 2 * GIB, "traffic_bytes": GIB,
        "collectives": [], "seconds": {"compute": 0.1, "memory": 0.1, "network": {}}, "step_seconds": [0.1, 0.2],
        "tokens_per_second": [1.0, 2.0], "tokens": tokens, "chip_hours": hours,
    } | more  # fmt: skip


def cells(table, **wanted):
    """The lines of a table whose named columns read so, each as a dict by column."""
    lines = [dict(zip(COLUMNS, line, strict=True)) for line in table]
    return [line for line in lines if all(line[name] == value for name, value in wanted.items())]


def test_the_table_has_tokens_chip_hours_and_their_total(tmp_path):
    whole, divided = {"fsdp": 16}, {"fsdp": 8, "tensor": 2}
    records = [
        record("align", whole, [1.0, 2.0], 1e9),
        record("distill", whole, [10.0, 20.0], 3e9),
        record("finetune", whole, [100.0, 2000.0], 0.5e9),
        record("decode", whole, None, steps=0),
        record("align", divided, [2.0, 3.0], 1e9),
        record("distill", divided, [4.0, 5.0], 3e9),
    ]
    for one in ("tokens", "chip_hours"):
        del records[3][one]
    table = rows(records)
    assert [line["tokens"] for line in cells(table, mesh="fsdp=16")] == ["1B", "3B", "0.5B", "", "4.5B"]
    [total] = cells(table, stage="align+distill+finetune")
    assert (total["machine"], total["mesh"], total["chip-hours"]) == ("v5e-16", "fsdp=16", "111-2,022")
    # Only what was asked for is summed, and its name says so.
    [total] = cells(table, stage="align+distill")
    assert (total["mesh"], total["tokens"], total["chip-hours"]) == ("fsdp=8,tensor=2", "4B", "6-8")
    assert "111-2,022" in overview(records)
    page = write_plan(records, tmp_path).read_text()
    assert "<th>chip-hours</th>" in page and "<td>111-2,022</td>" in page and page.count("<tr>") == 1 + 8


@pytest.mark.parametrize("change", [{"fits": False}, {"stage": "decode", "steps": 0}])
def test_no_total_of_a_part_of_what_was_asked_for(change):
    one, other = record("align", {}, [1.0, 2.0]), record("distill", {}, [1.0, 2.0]) | change
    del other["chip_hours"], other["tokens"]
    assert not totals([one, other]) and not totals([one]) and len(totals([one, record("distill", {}, [1.0, 2.0])])) == 1


def test_a_mesh_that_does_not_divide_is_a_row_of_the_sweep(config_file, tmp_path, capsys):
    words = ["--mesh", "fsdp=4,tensor=2", "--mesh", "fsdp=8", "--stages", "distill", "decode"]
    words += ["--set", "distill.batch_size=12", "--json", str(tmp_path / "plan.json"), "--out", str(tmp_path)]
    assert main(["plan", "--config", str(config_file), "--topology", "cpu8", *words]) == 0
    said = capsys.readouterr().out
    why = "batch_size 12 in 1 microbatches gives 12 rows, which do not divide over data=1 x fsdp=8"
    assert f"  distill: not compiled: {why}" in said
    records = json.loads((tmp_path / "plan.json").read_text())
    assert [(r["stage"], r["mesh"]["fsdp"], r["fits"]) for r in records] == [
        ("distill", 4, True), ("decode", 4, True), ("distill", 8, False), ("decode", 8, True),
    ]  # fmt: skip
    assert not totals(records) and records[2]["steps"] == 10
    assert records[2]["refused"].startswith(why) and all("refused" not in r for r in records if r["fits"])
    [line] = cells(rows(records), mesh="fsdp=8", stage="distill")
    assert line["fits"] == "no" and line["note"].startswith(why) and line["compile s"] == ""
    assert why in (tmp_path / "plan.html").read_text()
    assert describe(records[2]).count("\n") == 0


def test_a_quick_plan_says_where_a_runs_own_effort_may_not_fit():
    tpu, all_of_it = machine("v5e-16"), 15.75 * GIB
    # What lies there, and temporaries that grow by two fifths at a run's own effort.
    assert not little_room(all_of_it - 0.41 * 4 * GIB, 4 * GIB, QUICK, tpu)
    assert little_room(all_of_it - 0.39 * 4 * GIB, 4 * GIB, QUICK, tpu)
    assert not little_room(all_of_it - 0.39 * 4 * GIB, 4 * GIB, FULL, tpu)
    assert not little_room(79 * GIB, 40 * GIB, QUICK, machine("h100x8")) and not little_room(1, 1, QUICK, None)


def test_little_room_is_in_the_verdict_the_record_and_the_table(config_file, tmp_path, monkeypatch, capsys):
    tight = Compiled({"parameters": 9 * GIB}, temporaries=5 * GIB, tight=True)
    monkeypatch.setattr(machines, "CPU", dataclasses.replace(machines.CPU, memory=15.75))
    monkeypatch.setattr(planning, "compile_work", lambda *_: tight)
    words = ["--topology", "cpu8", "--stages", "distill", "finetune", "--json", str(tmp_path / "plan.json")]
    assert main(["plan", "--config", str(config_file), *words]) == 0
    said = capsys.readouterr().out
    assert (
        "distill: fits with little room for what a run's own effort may add: plan with --full, 14.00 of 15.75 GiB"
        in said
    )
    records = json.loads((tmp_path / "plan.json").read_text())
    assert [record["little_room"] for record in records] == [True, True]
    assert all(line["fits"] == "yes" and line["note"] == "little room: --full" for line in cells(rows(records)))
    monkeypatch.setattr(planning, "compile_work", lambda *_: dataclasses.replace(tight, tight=False))
    assert main(["plan", "--config", str(config_file), *words]) == 0
    assert "little room" not in capsys.readouterr().out


def test_a_remedy_with_little_room_says_so(config_file):
    config = load_config(config_file)
    found = remedy("finetune", config, {"data": 2, "fsdp": 4}, lambda *_: Compiled({}, tight=True), print)
    assert found.endswith("fits (0.0 GiB; compiled), with little room: plan it with --full")


@pytest.mark.parametrize("meshes", [["fsdp=8"], ["fsdp=8", "data=8"]])
def test_a_stage_that_divides_on_no_mesh_is_a_mistake(config_file, capsys, meshes):
    words = [word for mesh in meshes for word in ("--mesh", mesh)] + ["--set", "distill.batch_size=12"]
    assert main(["plan", "--config", str(config_file), "--topology", "cpu8", *words]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("hypenet: distill on cpu8, mesh fsdp=8: batch_size 12") and not told.out
