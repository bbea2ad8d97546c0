"""`hypenet bench train`: real steps of a conversion's stages on the devices here, with random weights and documents."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hypenet_jax.data.batches import StageBatches
from hypenet_jax.data.packing import PackedTokens
from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.settings import ConvertConfig
from hypenet_jax.halo.workdir import write_json
from hypenet_jax.hub.published import config_of
from hypenet_jax.model import ModelConfig
from hypenet_jax.parallel import processes
from hypenet_jax.parallel.mesh import check_compute_dtype, make_mesh
from hypenet_jax.parallel.processes import own_rows
from hypenet_jax.parallel.rules import batch_sharding
from hypenet_jax.plan.compile import held
from hypenet_jax.plan.flops import model_flops, training_flops
from hypenet_jax.plan.machines import GIB, chip_of
from hypenet_jax.plan.planning import written
from hypenet_jax.plan.running import WARM_UP, Steps, random_arrays, timed_steps
from hypenet_jax.plan.stages import TRAINING, Work, trained_student, work_of
from hypenet_jax.plan.synthetic import mean_span, random_pack
from hypenet_jax.train.checkpoint import versions
from hypenet_jax.train.loop import place_batch
from hypenet_jax.train.stage import StageConfig
from kernels_pallas.bench.ceilings import matmul_rate

# Tokens of synthetic text at most; longer measurements read it again from its beginning.
MOST_TOKENS = 1 << 20
# The side of the matrices whose product stands for the peak of a device that we have no figures of.
SIDE, SMALL_SIDE = 8192, 1024
COLUMNS = {
    "stage": 10, "rows x tokens": 15, "documents": 11, "ms/step": 10, "tokens/s": 11, "TFLOP/s": 9, "MFU": 8,
    "with remat": 12, "GiB compiled": 14, "GiB peak": 10, "input": 8,
}  # fmt: skip


def bench_train(
    config: ConvertConfig,
    stages: Sequence[str] = TRAINING,
    steps: int = 10,
    *,
    documents: Sequence[int] = (1000,),
    json_file: str | None = None,
    say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Measure, print a line as each is done, and return {"device", "peak", "versions", "rows", ...}, JSON-able.

    The step is the one that training runs; the teacher may be a published name, as no weight is read. Tokens come
    through the data pipeline out of text that is made here. MFU is `flops.model_flops` of the documents as they lie in
    the rows, over the peak.

    With several processes all of them call it, and process 0 writes and says.

    Args:
      stages: of "align", "distill", "finetune".
      steps: measured ones, after a warm-up.
      documents: tokens a document on average, each measured on its own; 0 makes every row one document.

    Raises:
      HypenetError: an argument out of range, batches that do not divide over the mesh, or a teacher of unknown sizes.
    """
    for name, values, least in (("steps", [steps], 1), ("documents", documents, 0)):
        if min(values) < least:
            raise HypenetError(f"{name} is {min(values)}; it must be at least {least}")
    teacher, mesh = config_of(config.teacher), make_mesh(config.mesh or None)
    check_compute_dtype(config.dtype)
    peak = peak_of(mesh, config.dtype)
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "peak": peak,
        "versions": versions(),
        "config": dataclasses.asdict(config),
        "rows": [],
    }
    say = processes.said_once(say)
    top = f"peak {peak['flops'] / 1e12:.4g} TFLOP/s a device ({peak['source']})"
    say(f"{mesh.size} x {result['device']}, {written(dict(mesh.shape))}; {top}")
    say("".join(name.ljust(width) for name, width in COLUMNS.items()).rstrip())
    for stage in stages:
        for record in _stage(stage, config, teacher, mesh, steps, documents, peak["flops"]):
            result["rows"].append(record)
            say(line(record))
            if json_file and processes.is_writer():
                write_json(pathlib.Path(json_file), result)
    return result


def peak_of(mesh: Mesh, dtype: str) -> dict[str, Any]:
    """{"flops": of one device, a second, "source"}: its data sheet's, or what a large product reaches here."""
    device = mesh.local_devices[0]
    chip = chip_of(device.device_kind)
    if chip is not None:
        return {"flops": chip.flops, "source": "dense bfloat16, of its maker's data sheet (plan/machines.py)"}
    side = SMALL_SIDE if device.platform == "cpu" else SIDE
    source = f"we have no figures of this device: a {dtype} product of side {side}, measured"
    return {"flops": matmul_rate(side, dtype), "source": source}


def line(record: dict[str, Any]) -> str:
    """A row of the table."""
    shape = f"{record['rows']} x {record['seq_len']}"
    documents = str(record["documents"] or "whole rows")
    cells = [record["stage"], shape, documents]
    if "refused" in record:
        cells.append(f"does not fit: {record['refused']}")
    else:
        memory = record["memory"]
        peak = memory["process_peak_bytes"]
        cells += [
            f"{record['step_seconds'] * 1e3:.1f}",
            f"{record['tokens_per_second']:,.0f}",
            f"{record['flops_per_second'] / 1e12:.4g}",
            f"{record['mfu']:.1%}",
            f"{record['hfu']:.1%}",
            f"{memory['compiled_bytes'] / GIB:.2f}",
            f"{peak / GIB:.2f}" if peak else "-",
            f"{record['input_share']:.2%}",
        ]
    return "".join(cell.ljust(width) for cell, width in zip(cells, COLUMNS.values(), strict=False)).rstrip()


def _stage(
    name: str,
    config: ConvertConfig,
    teacher: ModelConfig,
    mesh: Mesh,
    steps: int,
    documents: Sequence[int],
    peak: float,
) -> Iterator[dict[str, Any]]:
    """A record for each length of documents; the program is compiled once."""
    stage: StageConfig = getattr(config, name)
    work = work_of(name, config, teacher, mesh)
    about = _about(name, config, teacher, work)
    try:
        start = time.monotonic()
        with jax.set_mesh(mesh):
            compiled = work.step.lower(*work.arguments).compile()
        about["compile_seconds"] = round(time.monotonic() - start, 1)
        state, frozen = (random_arrays(tree, seed) for seed, tree in enumerate(work.arguments[:2]))
        for mean in documents:
            with tempfile.TemporaryDirectory(prefix="hypenet-bench-") as directory:
                batches = _batches(pathlib.Path(directory), stage, teacher, mean, steps)
                state, timed, span = _run(compiled, state, frozen, batches, stage, mesh, config.data.workers)
            flops = _flops(name, config, teacher, span)
            yield (
                about
                | {"documents": mean, "span": span}
                | _numbers(work, timed, flops, mesh.size, peak)
                | {"memory": _memory(compiled, work, mesh)}
            )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        yield about | {"documents": documents[0], "refused": str(error).splitlines()[0][:200]}


def _batches(
    directory: pathlib.Path, stage: StageConfig, teacher: ModelConfig, mean: int, steps: int
) -> tuple[PackedTokens, int]:
    wanted = (WARM_UP + steps) * stage.tokens_per_step
    tokens = max(min(wanted, MOST_TOKENS), stage.seq_len)
    return random_pack(directory / "pack", teacher.vocab_size, stage.seq_len, mean or None, tokens), WARM_UP + steps


def _run(
    compiled: Any,
    state: Any,
    frozen: Any,
    text: tuple[PackedTokens, int],
    stage: StageConfig,
    mesh: Mesh,
    workers: int,
) -> tuple[Any, Steps, float]:
    """(state, seconds of the measured steps, `mean_span` of the documents in this process's rows of them)."""
    packed, steps = text
    batches = StageBatches(
        packed,
        seq_len=stage.seq_len,
        batch_size=stage.batch_size,
        start_token=0,
        steps=steps,
        seed=0,
        rows=own_rows(batch_sharding(mesh), stage.batch_size, stage.seq_len),
        workers=workers,
    )
    seen: list[np.ndarray] = []

    def placed(count: int) -> Iterator[dict[str, jax.Array]]:
        for _ in range(count):
            batch = next(batches)
            seen.append(batch["segment_ids"])
            yield place_batch(batch, stage, mesh)

    try:
        with jax.set_mesh(mesh):
            state, _ = timed_steps(compiled, state, frozen, placed(WARM_UP))
            state, timed = timed_steps(compiled, state, frozen, placed(steps - WARM_UP))
    finally:
        batches.close()
    return state, timed, mean_span(seen[WARM_UP:])


def _about(name: str, config: ConvertConfig, teacher: ModelConfig, work: Work) -> dict[str, Any]:
    stage: StageConfig = getattr(config, name)
    frozen = work.parts["teacher"]
    return {
        "stage": name,
        "rows": stage.batch_size,
        "seq_len": stage.seq_len,
        "microbatches": stage.gradient_accumulation,
        "dtype": config.dtype,
        "remat": config.remat,
        "trained_parameters": _count(work.parts["parameters"]),
        "frozen_parameters": 0 if frozen is None else _count(frozen),
        "tokens_per_step": work.tokens,
    }


def _flops(name: str, config: ConvertConfig, teacher: ModelConfig, span: float) -> tuple[float, float]:
    """(of the model, of the program with what it makes twice): operations per token of documents of this span."""
    student = trained_student(name, config, teacher).config
    remat = config.remat
    return model_flops(name, teacher, student, span), training_flops(name, teacher, student, span, remat)


def _numbers(work: Work, timed: Steps, flops: tuple[float, float], devices: int, peak: float) -> dict[str, Any]:
    rate = work.tokens / statistics.median(timed.whole)
    of_model, of_program = (each * rate / devices for each in flops)
    return {
        "steps": len(timed.whole),
        "step_seconds": statistics.median(timed.whole),
        "step_seconds_all": timed.whole,
        "tokens_per_second": rate,
        "input_seconds": statistics.median(timed.waiting),
        "input_share": sum(timed.waiting) / sum(timed.whole),
        "model_flops_per_token": flops[0],
        "program_flops_per_token": flops[1],
        "flops_per_second": of_model,
        "mfu": of_model / peak,
        "hfu": of_program / peak,
        "losses": [loss if math.isfinite(loss) else None for loss in timed.losses],
    }


def _memory(compiled: Any, work: Work, mesh: Mesh) -> dict[str, Any]:
    """Bytes on a device: what the compiler plans, and the most that this process has used so far, where it is known."""
    plan = compiled.memory_analysis()
    beside = plan.output_size_in_bytes - plan.alias_size_in_bytes
    arguments, temporaries = plan.argument_size_in_bytes, plan.temp_size_in_bytes
    found = [device.memory_stats() or {} for device in mesh.local_devices]
    return {
        "parts_bytes": {name: held(tree) for name, tree in work.parts.items() if tree is not None},
        "argument_bytes": arguments,
        "temporary_bytes": temporaries,
        "code_bytes": plan.generated_code_size_in_bytes,
        "compiled_bytes": arguments + beside + temporaries + plan.generated_code_size_in_bytes,
        "process_peak_bytes": max((stats.get("peak_bytes_in_use", 0) for stats in found), default=0) or None,
        "limit_bytes": max((stats.get("bytes_limit", 0) for stats in found), default=0) or None,
    }


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
