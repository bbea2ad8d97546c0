"""A directory that appears whole or not at all, and never in the place of something that is not ours."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hypenet_jax import __version__
from hypenet_jax.errors import HypenetError

MARKER = "hypenet_jax.json"
MADE_BY = "hypenet_jax"

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def new_directory(directory: Path, needed_bytes: int, about: dict[str, Any]) -> Iterator[Path]:
    """Yield a temporary sibling; when the block ends without an error, it becomes `directory`.

    An empty directory and a previous export of ours are replaced. needed_bytes: what the block will write, for an
    early word on a disk that cannot hold it. about: further keys of the marker file.

    Raises:
      HypenetError: `directory` holds something else, the disk is full, or the place cannot be written.
    """
    target = Path(directory).resolve()
    check_replaceable(target)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(target, needed_bytes)
        temporary.mkdir()
        yield temporary
        _write_marker(temporary, about)
        _flush(temporary)
        _move(temporary, target)
    except (OSError, SafetensorError) as error:
        raise _explained(error, target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_partial(directory: Path) -> None:
    """Remove what exports to `directory` have left beside it that were killed; only where nobody else writes there."""
    for kind in ("partial", "previous"):
        for left in directory.parent.glob(f".{directory.name}.????????.{kind}"):
            shutil.rmtree(left)


def check_replaceable(target: Path) -> None:
    """Raise HypenetError unless `target` is absent, empty, or a previous export that nobody added to."""
    if not target.exists():
        return
    if not target.is_dir():
        raise HypenetError(f"{target} is a file; give a directory to write to")
    present = sorted(entry.name for entry in target.iterdir())
    if not present:
        return
    ours = _read_marker(target / MARKER)
    if ours is None:
        raise HypenetError(f"{target} holds {present[0]} and is no export of ours; give an empty or new directory")
    foreign = [name for name in present if name not in ours]
    if foreign:
        raise HypenetError(
            f"{target} holds {foreign[0]}, which is not of the previous export there; give a new directory"
        )


def list_file(directory: Path, name: str) -> None:
    """Add a file to those that the marker of an export names; nothing where it does already."""
    path = directory / MARKER
    marker = json.loads(path.read_text(encoding="utf-8"))
    if name in marker["files"]:
        return
    marker["files"] = sorted([*marker["files"], name])
    replace_file(path, json.dumps(marker, indent=2) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Write a file of an export beside the export and move it to its place, whole or not at all."""
    directory = path.parent.resolve()
    aside = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def umask() -> int:
    """The process's umask, which can be read by setting it alone."""
    found = os.umask(0)
    os.umask(found)
    return found


def _read_marker(path: Path) -> list[str] | None:
    """The files of a previous export, or None where there is no marker of ours."""
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(marker, dict) or marker.get("made_by") != MADE_BY or not isinstance(marker.get("files"), list):
        return None
    return [*marker["files"], MARKER]


def _write_marker(directory: Path, about: dict[str, Any]) -> None:
    files = sorted(entry.name for entry in directory.iterdir())
    marker = {"made_by": MADE_BY, "version": __version__, **about, "files": files}
    (directory / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _check_space(target: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes:
        raise HypenetError(
            f"{target} needs {needed_bytes / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB free; make room or "
            "write elsewhere"
        )


def _flush(directory: Path) -> None:
    # A rename may reach the disk before the data does; a power cut would then leave empty files under the final name.
    for path in (*directory.iterdir(), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
        return
    previous = temporary.with_suffix(".previous")
    os.rename(target, previous)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(previous, target)
        raise
    shutil.rmtree(previous)


def _explained(error: OSError | SafetensorError, target: Path) -> HypenetError:
    # safetensors reports the system's error inside a message of its own.
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL or any(f"os error {code})" in str(error) for code in _FULL):
        return HypenetError(f"the disk of {target} is full; nothing was written, make room and save again")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return HypenetError(f"{target} cannot be written ({reason}); give another directory")
