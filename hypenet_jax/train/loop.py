"""The training loop of every stage."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from hypenet_jax.errors import HypenetError
from hypenet_jax.parallel.mesh import row_axes
from hypenet_jax.parallel.processes import check_local, own_rows, place_rows
from hypenet_jax.parallel.processes import place as place_array
from hypenet_jax.parallel.rules import batch_sharding, replicated
from hypenet_jax.train.checkpoint import Checkpoints
from hypenet_jax.train.metrics import ReporterLike
from hypenet_jax.train.preemption import EXIT_PREEMPTED, Preemption
from hypenet_jax.train.stage import StageConfig, check_resumable
from hypenet_jax.train.step import LossFn, abstract_state, create_state, make_step


class Batches(Protocol):
    """An endless iterator of batches whose position can be saved: dicts of numpy arrays [B, T, ...].

    With several processes each yields the rows of the same global batch that its devices hold (`processes.own_rows`).
    """

    def __next__(self) -> Mapping[str, np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def train(
    *,
    name: str,
    loss_fn: LossFn,
    params: Any,
    frozen: Any,
    batches: Batches,
    stage: StageConfig,
    directory: str | os.PathLike[str],
    mesh: Mesh,
    param_shardings: Any = None,
    model_info: dict[str, Any],
    reporter: ReporterLike,
    donate: bool = True,
    config: dict[str, Any] | None = None,
    update: Callable | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Trains `params`, or goes on where `directory` stopped; a finished stage returns at once.

    Killed at any moment and started again, a run gives the parameters, moments and metrics of an uninterrupted one to
    the bit (same mesh, same versions).

    Args:
      name: the stage's name, for messages.
      loss_fn: (params, frozen, batch) -> (loss, metrics); a scalar and a dict of scalars, both means over
        metrics["count"] items if that is present (see `step.loss_and_gradients`).
      params: nested dicts of arrays; left untouched. Trained as copies in the dtype `stage.weights`.
      frozen: any tree of arrays (or None) that loss_fn needs and nothing changes. Arrays not on `mesh` are replicated.
      batches: not touched before the first update, except that a resumed run sets its position.
      stage: the numbers.
      directory: gets checkpoints/, metrics.jsonl and TensorBoard events.
      mesh: see `parallel.mesh.make_mesh`.
      param_shardings: tree of NamedSharding like params; None replicates.
      model_info: JSON-able config of the model, saved with every checkpoint and compared on resume.
      reporter: see `metrics.Reporter`.
      donate: the update reuses the memory of the state before it.
      config: JSON-able config of the whole run, saved with every checkpoint for its reader; not compared.
      update: what `step.make_step` gave for this loss, stage and shapes, where several trainings share one compilation.

    Returns:
      (params on the mesh, summary {"name", "step", "resumed_from", "loss", "lr", "tokens", "seconds", ...}: the
      metrics of the last step, without "loss" and other means where nothing in its batch was to be learned).

    Raises:
      HypenetError: a loss that is not finite, data that ends early or has the wrong size, checkpoints of another model
        or stage, or unreadable ones.
      SystemExit: with EXIT_PREEMPTED, after SIGTERM; the state is saved.
    """
    check_local(directory, f"the directory of stage {name}")
    directory = os.path.abspath(directory)
    check_rows(stage, mesh)
    if param_shardings is None:
        param_shardings = jax.tree.map(lambda _: replicated(mesh), params)
    abstract = abstract_state(params, stage, param_shardings, mesh)

    with Preemption() as preemption, Checkpoints(directory, keep=stage.keep) as checkpoints:
        first, saved = checkpoints.latest_step() or 0, {}
        if first:
            saved = checkpoints.about(first)
            check_same_run(saved, stage, model_info, checkpoints.directory)
        if first >= stage.steps:
            done = checkpoints.restore(first, {"params": abstract["params"]})
            return done["params"], {"name": name, "resumed_from": first, **saved["metrics"]}
        if first:
            state = checkpoints.restore(first, abstract)
            batches.set_state(saved["data"])
        else:
            state = create_state(params, stage, abstract)
        del params
        frozen = _place_frozen(frozen, mesh)
        update = update or make_step(loss_fn, stage, abstract, mesh, donate)
        log = _Log(name, stage, reporter, saved.get("metrics", {}), checkpoints)

        with reporter.open(name, directory, stage.steps, first):
            if first:
                reporter.message(f"{name}: continuing from step {first} of {stage.steps}")
            for step in range(first + 1, stage.steps + 1):
                batch = place_batch(_next_batch(batches, step, stage), stage, mesh)
                # The mesh is in force while the step is traced: a kernel that no partitioner divides must know of it.
                with jax.set_mesh(mesh):
                    state, metrics = update(state, frozen, batch)
                log.add(step, metrics)
                preempted = preemption.requested()
                if preempted or step % stage.checkpoint_every == 0 or step == stage.steps:
                    # Before saving, so that a checkpoint never holds parameters after a bad step.
                    log.write_all()
                    reporter.flush()
                    about = {
                        "name": name,
                        "model": model_info,
                        "stage": dataclasses.asdict(stage),
                        "data": batches.get_state(),
                        "metrics": log.last,
                        "devices": _devices(mesh),
                        "config": config,
                    }
                    checkpoints.save(step, state, about)
                if preempted:
                    checkpoints.wait()
                    reporter.message(f"{name}: stopped at step {step} and saved; the same command continues")
                    raise SystemExit(EXIT_PREEMPTED)
    return state["params"], {"name": name, "resumed_from": first, **log.last}


def _devices(mesh: Mesh) -> dict[str, Any]:
    """What the numbers were computed on, JSON-able."""
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    return {"mesh": dict(mesh.shape), "processes": jax.process_count(), "kind": ", ".join(kinds)}


def check_rows(stage: StageConfig, mesh: Mesh) -> None:
    """Raise HypenetError unless the stage's microbatches divide over the mesh."""
    rows = stage.batch_size // stage.gradient_accumulation
    if rows % math.prod(mesh.shape[name] for name in row_axes(mesh)):
        over = " x ".join(f"{name}={mesh.shape[name]}" for name in row_axes(mesh))
        raise HypenetError(
            f"batch_size {stage.batch_size} in {stage.gradient_accumulation} microbatches gives {rows} rows, which do "
            f"not divide over {over}; change the batch or the mesh"
        )
    shards = mesh.shape["seq"]
    if shards > 1 and stage.seq_len % (2 * shards):
        raise HypenetError(
            f"seq_len is {stage.seq_len}, which does not divide into the {2 * shards} half-blocks of seq={shards}; "
            f"make it a multiple of {2 * shards}"
        )


def check_same_run(saved: dict[str, Any], stage: StageConfig, model_info: dict[str, Any], where: str) -> None:
    """Raise HypenetError unless the checkpoint that says `saved` of itself is of this stage and this model."""
    check_resumable(saved["stage"], stage, where)
    wanted = json.loads(json.dumps(model_info))
    for field in sorted(saved["model"].keys() | wanted.keys()):
        if saved["model"].get(field) != wanted.get(field):
            raise HypenetError(
                f"the model has {field} = {wanted.get(field)!r} but the checkpoints in {where} have "
                f"{saved['model'].get(field)!r}; choose another directory"
            )
    if saved["step"] > stage.steps:
        raise HypenetError(
            f"steps is {stage.steps} but {where} already holds step {saved['step']}; choose another directory"
        )


def _next_batch(batches: Batches, step: int, stage: StageConfig) -> Mapping[str, np.ndarray]:
    try:
        return next(batches)
    except StopIteration as error:
        sentence = f"the data ended before step {step} of {stage.steps}; give more data or fewer steps"
        raise HypenetError(sentence) from error


def place_batch(batch: Mapping[str, np.ndarray], stage: StageConfig, mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows as arrays over the whole mesh."""
    sharding = batch_sharding(mesh)
    rows = len(own_rows(sharding, stage.batch_size, stage.seq_len))
    for key, array in batch.items():
        if array.shape[:2] != (rows, stage.seq_len):
            raise HypenetError(
                f"batch array {key!r} has shape {array.shape}; the stage needs [{rows}, {stage.seq_len}] a process"
            )
    return {key: place_rows(array, sharding, stage.batch_size) for key, array in batch.items()}


def _place_frozen(frozen: Any, mesh: Mesh) -> Any:
    """Arrays already spread over the mesh stay; the others are replicated."""

    def place(leaf: Any) -> jax.Array:
        sharding = getattr(leaf, "sharding", None)
        on_mesh = isinstance(sharding, NamedSharding) and sharding.device_set == set(mesh.devices.flat)
        return leaf if on_mesh else place_array(leaf, replicated(mesh))

    return jax.tree.map(place, frozen)


class _Log:
    """Fetches metrics in time to catch a bad loss, but late enough not to stall the device.

    The metrics of a step stay on the device until the next step is under way; then those since the last record are
    fetched together, checked, and the record of the step is written. Records are those of step 1, every log_every steps
    and the last step, whether or not the run was interrupted.
    """

    def __init__(
        self, name: str, stage: StageConfig, reporter: ReporterLike, last: dict[str, Any], checkpoints: Checkpoints
    ):
        self._name, self._stage, self._reporter, self._checkpoints = name, stage, reporter, checkpoints
        self._pending: dict[int, dict[str, jax.Array]] = {}
        self._seconds_before = last.get("seconds", 0.0)
        self._start = time.monotonic()
        self._previous = (last.get("tokens", 0), self._seconds_before)
        # The record of the newest step that was fetched.
        self.last: dict[str, Any] = last

    def _wants(self, step: int) -> bool:
        return step == 1 or step % self._stage.log_every == 0 or step == self._stage.steps

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the step just dispatched; may write the record of the one before."""
        if self._pending and self._wants(step - 1):
            self.write_all()
        self._pending[step] = metrics

    def write_all(self) -> None:
        """Fetches what is pending (waiting for it), checks every step, writes the records due."""
        for step, metrics in jax.device_get(self._pending).items():
            values = {key: float(value) for key, value in sorted(metrics.items())}
            for key in ("loss", "grad_norm"):
                if not math.isfinite(values[key]):
                    self._stop(step, key, values[key])
            seconds = self._seconds_before + time.monotonic() - self._start
            if values.get("count") == 0:
                # A mean over nothing, which comes out as 0, is no loss.
                values = {key: values[key] for key in ("count", "grad_norm", "lr")}
            losses = {"loss": values.pop("loss")} if "loss" in values else {}
            self.last = {"step": step, **losses, "tokens": step * self._stage.tokens_per_step}
            self.last |= {"seconds": round(seconds, 3), **values}
            if self._wants(step):
                tokens, before = self._previous
                self._previous = (self.last["tokens"], seconds)
                self.last["tokens_per_second"] = round((self.last["tokens"] - tokens) / max(seconds - before, 1e-9), 1)
                self._reporter.log(self.last)
        self._pending = {}

    def _stop(self, step: int, key: str, value: float) -> None:
        kept = self._checkpoints.latest_step()
        remedy = f"the checkpoint of step {kept} is kept" if kept else "no checkpoint was written yet"
        raise HypenetError(
            f"{self._name}: {key} is {value} at step {step}; {remedy}; lower peak_lr {self._stage.peak_lr:g} or look "
            "at the data of that step"
        )
