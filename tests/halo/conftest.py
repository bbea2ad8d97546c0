"""Tiny conversions through the command line, in this process and on one device."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from hypenet_jax.cli import main
from hypenet_jax.model import LanguageModel, ModelConfig
from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.train import preemption

CONVERT = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.teacher = {teacher!r}
    config.dtype = "float32"
    config.remat = False
    config.data = dict(sources=({documents!r},), heldout_share=0.3)
    config.student = dict(start="calibrated")
    shared = dict(batch_size=4, seq_len=64, warmup_steps=1, log_every=1, checkpoint_every=2)
    config.align = dict(steps=5, peak_lr=3e-3, end_lr=1e-4, **shared)
    config.select = dict(method="kl-ls", questions=4, length=512, batch_size=4, answer_budget=16, keep=1)
    config.distill = dict(steps=5, peak_lr=2e-3, end_lr=1e-5, **shared)
    config.finetune = dict(steps=4, peak_lr=1e-3, end_lr=1e-5, **shared)
    config.fit_scale = dict(length=128, documents=3, grid=(2, 20, 200), batch_size=2)
    config.evaluate = dict(
        tasks=("S1",), lengths=(512,), samples=2, answer_budget=16, alternatives=False, perplexity_length=128,
        perplexity_documents=2, batch_tokens=1024, prompts=("One of the",), new_tokens=4,
    )
    return config
"""


def one_device(axes: Any) -> jax.sharding.Mesh:
    return make_mesh(axes, jax.devices()[:1])


@pytest.fixture
def on_one_device(monkeypatch) -> None:
    for module in ("run", "pretrain", "compare"):
        monkeypatch.setattr(f"hypenet_jax.halo.{module}.make_mesh", one_device)


@pytest.fixture
def of_two_processes(monkeypatch) -> types.SimpleNamespace:
    """SIGTERM as one of several processes hears of it, by jax.distributed; it has come once `asked` is set."""
    played = types.SimpleNamespace(asked=False)
    distributed = types.SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setattr(preemption, "jax", types.SimpleNamespace(process_count=lambda: 2, distributed=distributed))
    monkeypatch.setattr(preemption, "_all_asked", lambda: played.asked)
    return played


@pytest.fixture(scope="session")
def convert_config(tmp_path_factory, byte_teacher, documents_file) -> pathlib.Path:
    """The config program of the tiny conversion."""
    program = tmp_path_factory.mktemp("config") / "tiny.py"
    program.write_text(CONVERT.format(teacher=str(byte_teacher), documents=str(documents_file)))
    return program


@pytest.fixture(scope="session")
def finished(tmp_path_factory, convert_config) -> pathlib.Path:
    """The work directory of an uninterrupted `hypenet convert`. Tests leave it as it is."""
    with pytest.MonkeyPatch.context() as patch, alone(tmp_path_factory.getbasetemp()):
        patch.setattr("hypenet_jax.halo.run.make_mesh", one_device)
        directory = tmp_path_factory.mktemp("conversion") / "run"
        assert main(["convert", "--config", str(convert_config), "--workdir", str(directory)]) == 0
    return directory


@contextlib.contextmanager
def alone(directory: pathlib.Path) -> Iterator[None]:
    """One of pytest-xdist's workers at a time: two would compile the same programs."""
    with open(directory.parent / "hypenet-conversion.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def stage_records() -> Callable[[pathlib.Path], list[dict]]:
    """The metrics lines of a stage without what the clock says."""

    def records(stage: pathlib.Path) -> list[dict]:
        lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
        return [{key: line[key] for key in line if key not in ("seconds", "tokens_per_second")} for line in lines]

    return records


@pytest.fixture(scope="session")
def contents() -> Callable[[pathlib.Path], dict[str, bytes]]:
    """{relative path: bytes} of every file below a directory."""

    def read(directory: pathlib.Path) -> dict[str, bytes]:
        files = (path for path in sorted(directory.rglob("*")) if path.is_file())
        return {os.fspath(path.relative_to(directory)): path.read_bytes() for path in files}

    return read


@pytest.fixture(scope="session")
def exported(contents) -> Callable[[pathlib.Path], dict[str, bytes]]:
    """The files of a run's export without its card, which tells of the clock and of the run's directory."""

    def read(run: pathlib.Path) -> dict[str, bytes]:
        files = contents(run / "export")
        assert files.pop("README.md")
        return files

    return read


@pytest.fixture(scope="session")
def tiny() -> tuple[LanguageModel, dict]:
    """A teacher of two layers over 31 tokens, its parameters random and large enough to matter."""
    config = ModelConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        mixers=("attention", "attention"), rope_theta=1e4, tie_embeddings=False,
    )  # fmt: skip
    model, rng = LanguageModel(config), np.random.default_rng(1)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape, np.float32)
        return 1 + 0.3 * noise if len(leaf.shape) == 1 else 0.3 * noise

    return model, jax.tree.map(draw, model.param_shapes())


@pytest.fixture(scope="session")
def packed_batch() -> dict[str, np.ndarray]:
    """Two rows of 22 tokens with several documents, padding between, before and after them."""
    rng = np.random.default_rng(2)
    segments = np.array([[0] * 9 + [1] * 6 + [-1] * 2 + [2] * 5, [-1] * 3 + [4] * 12 + [0] * 4 + [-1] * 3], np.int32)
    same = np.zeros(segments.shape, bool)
    same[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
    tokens = rng.integers(0, 31, (2, 23), dtype=np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segments, "loss_mask": same}
