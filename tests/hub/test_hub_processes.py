"""A model spread over two processes is saved tensor by tensor: the bytes of an ordinary save, never the whole model."""

import json
import math
import pathlib
import sys

import jax
from save_spread import model_and_params

import hypenet_jax as hn

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "parallel"))

from process_runs import codes, said, started  # noqa: E402

FILE_BYTES = 2_000_000


def test_saved_from_two_processes_file_by_file(tmp_path):
    command = [str(HERE / "save_spread.py"), str(tmp_path / "spread"), str(FILE_BYTES)]
    with started(command, 2, tmp_path / "logs", paths=[HERE]) as running:
        assert codes(running, 120) == [0, 0], said(tmp_path / "logs")
    model, params = model_and_params()
    hn.save(model, params, tmp_path / "whole", max_shard_bytes=FILE_BYTES)
    got, wanted = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("spread", "whole")
    )
    assert got == wanted and "model.safetensors.index.json" in got and len(got) > 6
    total = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    largest = max(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    writer, other = (json.loads((tmp_path / f"spread-{n}.json").read_text()) for n in range(2))
    norms = 20_000  # whole on every device anyway
    assert writer["gathered"] <= FILE_BYTES + largest + norms < total / 3
    assert other["gathered"] <= largest + norms
    # The writer's host has one file: the values, and safetensors' copy of them.
    assert writer["host"] < 3 * FILE_BYTES < total
    assert writer["left"] == writer["arrays"] and other["left"] == other["arrays"]
