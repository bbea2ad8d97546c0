"""`hypenet bench kernels` on small shapes: every implementation that runs here is measured, the others say why not."""

import json

import pytest

from hypenet_jax import cli, cli_arguments
from kernels_pallas import bench as package
from kernels_pallas.bench import peers, timing


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "MAX_CALLS", 1)


def test_the_command_measures_and_writes(tmp_path, capsys):
    target = tmp_path / "kernels.json"
    assert cli.main(["bench", "kernels", "--only", "decode", "linear_kl", "--json", str(target)]) == 0
    result = json.loads(target.read_text())
    assert result["ceilings"]["copy_bytes_per_second"] > 0 and result["versions"]["jax"]
    rows = {(row["kernel"], row["implementation"]): row for row in result["rows"]}
    assert rows["decode attention", "tpu"]["refused"] == "it runs on TPU and this is cpu"
    for key in (("decode attention", "xla"), ("linear_kl + backward", "xla")):
        assert rows[key]["milliseconds"] > 0 and rows[key]["share"] > 0
        assert rows[key]["temporary_bytes"] >= 0
    printed = capsys.readouterr().out
    assert "of ceiling" in printed and "its four products alone" in printed


def test_a_peer_that_fails_is_a_line_of_the_table(monkeypatch):
    def fla(shapes, width):
        return {"decode attention B1 keys 4096 H16/8": "fails: out of memory"}

    monkeypatch.setattr(peers, "fla", fla)
    lines = []
    rows = package.bench(("decode",), small=True, say=lines.append)["rows"]
    (row,) = (row for row in rows if row["implementation"] == "fla")
    assert row["refused"] == "fails: out of memory" and "milliseconds" not in row
    assert any("fla" in line and "out of memory" in line for line in lines)


def test_nothing_is_overwritten(tmp_path, capsys):
    target = tmp_path / "kernels.json"
    target.write_text("mine")
    assert cli.main(["bench", "kernels", "--only", "decode", "--json", str(target)]) == 2
    assert "name a new file" in capsys.readouterr().err
    assert target.read_text() == "mine"


def test_the_command_knows_the_kernels():
    with pytest.raises(ValueError, match="no kernel 'mamba' to measure; known: lightning, "):
        package.bench(("mamba",))
    bench = cli_arguments.parser()._subparsers._group_actions[0].choices["bench"]
    kernels = bench._subparsers._group_actions[0].choices["kernels"]
    action = next(action for action in kernels._actions if action.dest == "only")
    assert tuple(action.choices) == package.KERNELS
