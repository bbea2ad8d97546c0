"""A work directory: claimed by one config, its small results written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

from hypenet_jax import config as configs
from hypenet_jax.errors import HypenetError
from hypenet_jax.parallel.processes import check_local, first
from hypenet_jax.train.checkpoint import versions
from hypenet_jax.train.stage import FREE_FIELDS

CONFIG, DATA = "config.json", "data"
TEMPORARY = ".tmp"
# The commands that write what a later one reads.
WRITERS = {"select.json": "hypenet select", "fit_scale.json": "hypenet fit-scale"}
# What may differ when a run continues: what is measured, on which devices, and how the same numbers are computed. A
# stage that was stopped on its way refuses other workers itself, by the saved position of its data.
FREE = (
    "data.workers",
    "evaluate",
    "compare",
    "ablate",
    "mesh",
    "rules",
    "teacher_rules",
    "teacher_output",
    "remat",
    "exchange",
    *(f"{stage}.{field}" for stage in ("align", "distill", "finetune", "train") for field in FREE_FIELDS),
)

# What a step alone reads may differ until it has begun: what it leaves in the directory, and its settings.
BEFORE = {
    "finetune": ("finetune", "finetune_loss", "finetune_sources"),
    "fit_scale.json": ("fit_scale",),
}


def claim(
    directory: str | os.PathLike, config: Any, free: tuple[str, ...] = FREE, *, lasting: bool = True
) -> pathlib.Path:
    """Make the directory this config's own, or continue in it when it already is.

    lasting: False leaves the config of a run that has begun as it is, for callers that have more to check first.
    Sections and fields in `free` may differ from an earlier run's, and those of `BEFORE` until their step has begun;
    before any step has run everything may. Raises HypenetError when the directory holds something else, or a run of
    another config (naming the first field that differs).
    """
    check_local(directory, "the work directory")
    path = pathlib.Path(directory)
    first(lambda: _claim(path, config, free, lasting))
    return path


def _claim(path: pathlib.Path, config: Any, free: tuple[str, ...], lasting: bool) -> None:
    wanted = json.loads(json.dumps(configs.to_mapping(config)))
    if path.exists() and not path.is_dir():
        raise HypenetError(f"the work directory {path} is a file; choose another")
    # A kill while the config was written leaves its temporary file.
    held = {entry.name for entry in path.iterdir()} - {CONFIG + TEMPORARY} if path.is_dir() else set()
    before = read_json(path / CONFIG) if CONFIG in held else None
    if held and not (isinstance(before, dict) and isinstance(before.get(DATA), dict)):
        raise HypenetError(f"the work directory {path} holds something else; choose an empty or a new one")
    begun = held - {CONFIG, DATA}
    if before and begun:
        before = _with_defaults(type(config), before)
        later = tuple(field for left, fields in BEFORE.items() if left not in begun for field in fields)
        changed = configs.differences(before, wanted, (*free, *later))
        if changed:
            raise HypenetError(f"the work directory {path} belongs to another run: {changed[0]}; choose another")
    if lasting or not begun:
        _write_json(path / CONFIG, wanted)


def _with_defaults(kind: type, before: dict) -> dict:
    """An earlier version's config with the fields it lacks at their defaults, which is what it ran with."""
    try:
        return json.loads(json.dumps(configs.to_mapping(configs.from_mapping(kind, before))))
    except HypenetError:
        return before


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a JSON file beside its place and move it there: process 0 does, and all go on when it is there."""
    first(lambda: _write_json(path, value))


def _write_json(path: pathlib.Path, value: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + TEMPORARY)
        aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise HypenetError(f"{path} cannot be written ({error.strerror}); free space or choose another place") from None


def read_json(path: pathlib.Path) -> Any:
    """The file's value; HypenetError for a missing or broken file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        writer = f"`{WRITERS[path.name]}`" if path.name in WRITERS else "the step that writes it"
        raise HypenetError(f"{path} is missing; run {writer} first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HypenetError(f"{path} is not valid JSON ({error}); remove it and run its step again") from None


def made_by() -> dict[str, Any]:
    """{"command", "versions", "device"} of this process, for what it measures; the command can be pasted."""
    return {
        "command": shlex.join(["hypenet", *sys.argv[1:]]),
        "versions": versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


@contextlib.contextmanager
def timed(workdir: pathlib.Path, step: str) -> Iterator[None]:
    """Add the seconds that the body takes to run.json; see `add_seconds`."""
    start = time.monotonic()
    try:
        yield
    except SystemExit:
        # Stopped and saved: what it took counts, as the step goes on from there.
        add_seconds(workdir, step, time.monotonic() - start)
        raise
    add_seconds(workdir, step, time.monotonic() - start)


def add_seconds(workdir: pathlib.Path, step: str, seconds: float) -> None:
    """Add seconds to a step's in run.json, with the command, versions and device that ran it."""
    path = workdir / "run.json"

    def add() -> None:
        run = read_json(path) if path.is_file() else {"seconds": {}}
        run |= made_by()
        run["processes"] = jax.process_count()
        run["seconds"][step] = round(run["seconds"].get(step, 0.0) + seconds, 1)
        _write_json(path, run)

    first(add)
