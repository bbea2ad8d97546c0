"""`hypenet bench exchange` times attention over a divided row, and refuses what cannot be divided."""

import json

import pytest

from hypenet_jax.cli import main

SMALL = ["--heads", "4", "--kv-heads", "2", "--width", "8"]


def test_the_command_measures_and_writes(tmp_path, capsys):
    assert main(["bench", "exchange", "--lengths", "64", *SMALL, "--json", str(tmp_path / "e.json")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("8 x cpu") and len(said) == 5
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert [row["exchange"] for row in rows] == ["one device", "ring", "gather"]
    assert rows[0]["speedup"] == [1, 1] and all(row["gathered_bytes"] == 2 * 64 * 2 * 8 * 4 for row in rows)
    for row in rows:
        assert row["with_backward_ms"] > 0 and row["speedup"][0] == rows[0]["forward_ms"] / row["forward_ms"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--lengths", "64", "72", *SMALL], "a row of 72 tokens does not divide into 16 half-blocks"),
        (["--heads", "3", "--kv-heads", "2"], "3 query heads do not divide over 2 key heads"),
        (["--width", "0"], "width is 0; it must be at least 1"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, capsys):
    assert main(["bench", "exchange", *words]) == 2
    told = capsys.readouterr()
    assert sentence in told.err and not told.out
