"""A toy model, a toy data stream and the shortest call of `train`, for the tests of this directory."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.parallel.rules import param_shardings
from hypenet_jax.train.loop import train
from hypenet_jax.train.metrics import Reporter
from hypenet_jax.train.stage import StageConfig

VOCAB, WIDTH, HIDDEN = 16, 8, 12
AXES = {
    "embedding": ("vocab", "embed"),
    "final_norm": ("norm",),
    "mlp": {"up": ("embed", "mlp"), "down": ("mlp", "embed")},
}
MODEL = {"vocab": VOCAB, "layers": [1, 2]}


class Interrupted(Exception):
    pass


class Stream:
    """Batches that depend on the position alone; raises Interrupted instead of giving batch number `fail_at`."""

    def __init__(self, rows: int = 8, length: int = 8, fail_at: int | None = None, end_at: int | None = None):
        self.position, self.rows, self.length, self.fail_at, self.end_at = 0, rows, length, fail_at, end_at

    def __next__(self) -> dict[str, np.ndarray]:
        if self.position == self.fail_at:
            raise Interrupted
        if self.position == self.end_at:
            raise StopIteration
        rng = np.random.default_rng(self.position)
        self.position += 1
        tokens = rng.integers(0, VOCAB, (self.rows, self.length + 1), dtype=np.int32)
        # Rows with very different counts of unmasked tokens.
        mask = np.arange(self.length)[None] < rng.integers(1, self.length + 1, (self.rows, 1))
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": mask}

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def init_params(seed: int = 0) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "embedding": jax.random.normal(keys[0], (VOCAB, WIDTH)),
        "final_norm": jnp.ones(WIDTH),
        "mlp": {
            "up": jax.random.normal(keys[1], (WIDTH, HIDDEN)) / WIDTH**0.5,
            "down": jax.random.normal(keys[2], (HIDDEN, WIDTH)) / HIDDEN**0.5,
        },
    }


def loss_fn(params, frozen, batch):
    x_BTD = params["embedding"][batch["tokens"]]
    x_BTD += jax.nn.silu(x_BTD @ params["mlp"]["up"]) @ params["mlp"]["down"]
    logits_BTV = (x_BTD * params["final_norm"] * frozen) @ params["embedding"].T
    nll_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), batch["targets"][..., None], axis=-1)[..., 0]
    count = jnp.sum(batch["loss_mask"], dtype=jnp.float32)
    loss = jnp.sum(nll_BT * batch["loss_mask"]) / jnp.maximum(count, 1)
    hits_BT = (jnp.argmax(logits_BTV, -1) == batch["targets"]) * batch["loss_mask"]
    return loss, {"count": count, "accuracy": jnp.sum(hits_BT) / jnp.maximum(count, 1)}


def make_stage(**changes) -> StageConfig:
    numbers = {"steps": 12, "batch_size": 8, "seq_len": 8, "peak_lr": 1e-2, "end_lr": 1e-3, "warmup_steps": 3}
    return StageConfig(**(numbers | {"log_every": 2, "checkpoint_every": 4} | changes))


def one_device():
    return make_mesh(None, jax.devices()[:1])


def run(directory, stage=None, mesh=None, stream=None, sharded=False, reporter=None, **changes):
    """(params, summary) of the toy model trained in `directory`."""
    stage = make_stage() if stage is None else stage
    mesh = one_device() if mesh is None else mesh
    params = init_params()
    arguments = {
        "name": "toy",
        "loss_fn": loss_fn,
        "params": params,
        "frozen": jnp.float32(0.5),
        "batches": Stream(stage.batch_size, stage.seq_len) if stream is None else stream,
        "stage": stage,
        "directory": directory,
        "mesh": mesh,
        "param_shardings": param_shardings(AXES, params, mesh) if sharded else None,
        "model_info": MODEL,
        "reporter": Reporter(tensorboard=False) if reporter is None else reporter,
    }
    return train(**(arguments | changes))


def records(directory) -> list[dict[str, Any]]:
    """The metrics lines without what the clock says."""
    lines = [json.loads(line) for line in (pathlib.Path(directory) / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in ("seconds", "tokens_per_second")} for line in lines]
