"""The frozen teacher's output for stage 2, computed once and kept: `hypenet cache-teacher`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hypenet_jax.data.batches import batch_of
from hypenet_jax.data.packing import PackedTokens
from hypenet_jax.data.records import Records
from hypenet_jax.data.teacher_rows import FORMAT, FORMS, META, TeacherOutput, TeacherRows, check_same, write_file
from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.settings import check_choice
from hypenet_jax.halo.workdir import read_json, write_json
from hypenet_jax.model import LanguageModel
from hypenet_jax.model.serialize import config_to_dict
from hypenet_jax.parallel.processes import first, is_writer, on_writer, own_rows, place_rows
from hypenet_jax.parallel.rules import batch_sharding
from hypenet_jax.train.preemption import stop_if_asked
from hypenet_jax.train.stage import StageConfig

# The directory in a work directory, and what a file in it holds at most: what a kill costs.
DIRECTORY, FILE_BYTES = "teacher_output", 1 << 30
# What is being written, until meta.json says that all of it is.
REQUEST = "request.json"
# Tokens whose logits exist at a time.
TOKEN_CHUNK = 2048


def output_of(
    teacher: LanguageModel,
    fingerprint: str,
    text: PackedTokens,
    stage: StageConfig,
    start_token: int,
    top_k: int | None = None,
) -> TeacherOutput:
    """What the teacher's output for a stage is: its `top_k` likeliest tokens, or where None its hidden states."""
    wanted = TeacherOutput(
        form="hidden" if top_k is None else "top-k",
        width=top_k or teacher.config.hidden_size,
        dtype=teacher.dtype,
        teacher=fingerprint,
        data=text.fingerprint,
        start_token=start_token,
        seq_len=stage.seq_len,
        rows=stage.steps * stage.batch_size,
        rows_a_file=stage.batch_size,
    )
    batches = max(1, FILE_BYTES // (wanted.row_bytes * stage.batch_size))
    return dataclasses.replace(wanted, rows_a_file=batches * stage.batch_size)


def fingerprint(teacher: LanguageModel, params: Any) -> str:
    """sha256 of the config, the compute dtype and the weights' checksums; the same on every mesh."""

    @jax.jit
    def checksums(params: Any) -> Any:
        return jax.tree.map(_checksum, params)

    sums = jax.device_get(checksums(params))
    names = {jax.tree_util.keystr(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(sums)}
    about = {"config": config_to_dict(teacher.config), "dtype": teacher.dtype, "weights": names}
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _checksum(weights: jax.Array) -> jax.Array:
    """uint32: the sum of bits times odd numbers that tell places apart, modulo 2^32; no order of adding matters."""
    bits = jax.lax.bitcast_convert_type(weights.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(weights.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, weights.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def write(
    directory: pathlib.Path,
    output: TeacherOutput,
    teacher: LanguageModel,
    params: Any,
    text: PackedTokens,
    batch_size: int,
    mesh: Mesh,
    say: Callable[[str], None],
) -> None:
    """Write what is missing of `output` in `directory`; a complete one is left as it is.

    Raises HypenetError where the directory holds something else or the disk has no room.
    """
    check_choice("form", output.form, FORMS)
    wanted = dataclasses.asdict(output) | {"format": FORMAT}
    first(lambda: _begin(directory, wanted))
    missing = [number for number, name in enumerate(output.files) if not _is_whole(directory / name, output, number)]
    # All have to have looked before the first new file appears.
    first(lambda: None)
    rows = sum(len(_rows_of(output, number)) for number in missing)
    tokens = output.rows * output.seq_len
    say(
        f"cache-teacher  {tokens:,} tokens x {output.row_bytes // output.seq_len:,} bytes ({_words(output)}) are "
        f"{tokens * output.row_bytes / output.seq_len / 1e9:,.3f} GB in {directory}"
        + (f"; {output.rows - rows:,} of {output.rows:,} rows are there" if rows < output.rows else "")
    )
    first(lambda: _check_space(directory, rows * output.row_bytes))
    compute = jax.jit(_hidden(teacher) if output.form == "hidden" else _top_k(teacher, output.width))
    for done, number in enumerate(missing, start=1):
        found = _computed(compute, params, output, text, batch_size, mesh, _rows_of(output, number))
        if is_writer():
            write_file(directory / output.files[number], output, found)
        else:
            for _ in found:
                pass
        say(f"cache-teacher  file {done} of {len(missing)}")
        stop_if_asked(say, "cache-teacher")
    write_json(directory / META, wanted)


def _is_whole(file: pathlib.Path, output: TeacherOutput, number: int) -> bool:
    """Whether the file has all of its records; one that is cut short is written again."""
    try:
        return file.is_file() and len(Records([file], "write it again")) == len(_rows_of(output, number))
    except HypenetError:
        return False


def _begin(directory: pathlib.Path, wanted: dict) -> None:
    request = directory / REQUEST
    if directory.exists() and any(directory.iterdir()):
        held = read_json(request) if request.is_file() else {}
        changed = [name for name in wanted if held.get(name) != wanted[name]]
        if changed:
            was = repr(held.get(changed[0])) if held else "not ours"
            raise HypenetError(
                f"{directory} holds another teacher output ({changed[0]} is {was} there and {wanted[changed[0]]!r} "
                "here); remove it to write this one"
            )
    directory.mkdir(parents=True, exist_ok=True)
    for partial in directory.glob("*.partial"):
        partial.unlink()
    aside = request.with_name(REQUEST + ".partial")
    aside.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    aside.replace(request)


def _check_space(directory: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise HypenetError(
            f"the teacher output in {directory} needs {needed / 1e9:,.3f} GB more but the disk has {free / 1e9:,.3f} "
            "GB free; make room, or keep less with --form top-k"
        )


def _words(output: TeacherOutput) -> str:
    if output.form == "hidden":
        return f"last hidden states, {output.width} in {output.dtype}"
    return f"the {output.width} likeliest tokens and the others' mass"


def _rows_of(output: TeacherOutput, number: int) -> range:
    return range(number * output.rows_a_file, min((number + 1) * output.rows_a_file, output.rows))


def _computed(
    compute: Callable, params: Any, output: TeacherOutput, text: PackedTokens, batch_size: int, mesh: Mesh, rows: range
) -> Iterator[dict[str, np.ndarray]]:
    """Row by row on process 0; the others take part in computing and get nothing."""
    sharding = batch_sharding(mesh)
    own = np.asarray(own_rows(sharding, batch_size, output.seq_len))
    for start in range(rows.start, rows.stop, batch_size):
        starts = output.start_token + (start + own) * output.seq_len
        batch = batch_of(*text.rows(starts, output.seq_len + 1))
        placed = {name: place_rows(batch[name], sharding, batch_size) for name in ("tokens", "segment_ids")}
        with jax.set_mesh(mesh):
            arrays = compute(params, placed["tokens"], placed["segment_ids"])
        found = {name: on_writer(array) for name, array in arrays.items()}
        if is_writer():
            for row in range(batch_size):
                yield {name: array[row] for name, array in found.items() if array is not None}


def _hidden(teacher: LanguageModel) -> Callable:
    def hidden(params: Any, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> dict[str, jax.Array]:
        return {"teacher_hidden": teacher.hidden(params, tokens_BT, segment_ids_BT)}

    return hidden


def _top_k(teacher: LanguageModel, k: int) -> Callable:
    def top_k(params: Any, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> dict[str, jax.Array]:
        hidden_BTD = teacher.hidden(params, tokens_BT, segment_ids_BT)
        batch, length, width = hidden_BTD.shape
        chunk = max(1, min(length, TOKEN_CHUNK // batch))
        while length % chunk:
            chunk -= 1
        rows = jnp.arange(batch)[:, None, None], jnp.arange(chunk)[None, :, None]

        def one(hidden_BCD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            logits_BCV = teacher.project(params, hidden_BCD)
            whole_BC1 = jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
            best_BCK, indices_BCK = jax.lax.top_k(logits_BCV, k)
            others_BCV = logits_BCV.at[*rows, indices_BCK].set(-jnp.inf)
            tail_BC = jnp.sum(jnp.exp(others_BCV - whole_BC1), axis=-1)
            return indices_BCK, best_BCK - whole_BC1, tail_BC

        split = hidden_BTD.reshape(batch, length // chunk, chunk, width).swapaxes(0, 1)
        found = (x.swapaxes(0, 1).reshape(batch, length, *x.shape[3:]) for x in jax.lax.map(one, split))
        return dict(zip(("teacher_indices", "teacher_log_probs", "teacher_tail"), found, strict=True))

    return top_k


def rows_for(directory: pathlib.Path, wanted: TeacherOutput) -> TeacherRows:
    """The rows in `directory`, checked to be those that a stage asks for in any form; see `check_same`."""
    rows = TeacherRows(directory)
    check_same(directory, rows.output, wanted)
    return rows
