"""Where a plan or a scaling run writes: checked before anything is compiled, which may take minutes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile

from hypenet_jax.errors import HypenetError


@dataclasses.dataclass(frozen=True)
class Output:
    """What a command writes: a page of this title, and records that each have this field."""

    title: str
    page: str
    field: str

    @property
    def start(self) -> str:
        """What its page begins with."""
        return f"<!doctype html><meta charset=utf-8><title>{self.title}</title>"


PLAN = Output("Plan", "plan.html", "machine")
SCALING = Output("Scaling", "scaling.html", "devices")


def check_places(output: Output, json_file: str | None, directory: str | None) -> None:
    """Make the directories of the output and see that it can be written there. None: not asked for.

    Raises:
      HypenetError: a place that cannot be written, or that holds something else, which is not overwritten.
    """
    if json_file == "":
        raise HypenetError("--json is empty; name a file for the records")
    if directory == "":
        raise HypenetError("--out is empty; name a directory for the page")
    places = []
    if json_file:
        _check_records(pathlib.Path(json_file), output.field)
        places.append(pathlib.Path(json_file).parent)
    if directory:
        _check_page(pathlib.Path(directory) / output.page, output.start)
        places.append(pathlib.Path(directory))
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HypenetError(f"{place} cannot be a directory ({error.strerror}); choose another place") from None
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise HypenetError(f"{place} cannot be written to ({error.strerror}); choose another place") from None


def _check_records(path: pathlib.Path, field: str) -> None:
    if path.is_dir():
        raise HypenetError(f"{path} is a directory; name a file for the records")
    if not _exists(path):
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        held = None
    if not isinstance(held, list) or not all(isinstance(record, dict) and field in record for record in held):
        raise HypenetError(f"{path} exists and holds something else than such records; name another file")


def _check_page(path: pathlib.Path, start: str) -> None:
    if not _exists(path):
        return
    try:
        ours = path.read_text(encoding="utf-8", errors="replace").startswith(start)
    except OSError:
        ours = False
    if not ours:
        raise HypenetError(f"{path} exists and is not a page of this command; name another directory")


def _exists(path: pathlib.Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise HypenetError(f"cannot use {path} ({error.strerror}); choose another place") from None
