"""What a teacher said about the rows of a stage, kept in ArrayRecord files: one record a row, in the stream's order.

meta.json says what the records are and of which teacher and tokens; it is written last, so that it stands for all of
them. A file appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
from array_record.python import array_record_module

from hypenet_jax.data.records import Records
from hypenet_jax.errors import HypenetError

META = "meta.json"
FORMAT = 1
FORMS = ("hidden", "top-k")
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class TeacherOutput:
    """What the records are, and of what: two with equal fields hold the same numbers for the rows they share.

    form: "hidden" (last hidden states [T, width] in `dtype`, the teacher's compute dtype) or "top-k" (the `width`
    likeliest tokens, their log-probabilities and the mass of all others). teacher: fingerprint of its config, weights
    and compute dtype. data: fingerprint of the packed tokens. Row r is the tokens from start_token + r * seq_len on;
    which rows make a batch is not said, for it does not matter here.
    """

    form: str
    width: int
    dtype: str
    teacher: str
    data: str
    start_token: int
    seq_len: int
    rows: int
    rows_a_file: int

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Name in the batch -> (shape, dtype) of a row's arrays, in the order of a record."""
        wide, one = (self.seq_len, self.width), (self.seq_len,)
        if self.form == "hidden":
            return {"teacher_hidden": (wide, _DTYPES[self.dtype])}
        return {
            "teacher_indices": (wide, np.dtype(np.int32)),
            "teacher_log_probs": (wide, np.dtype(np.float32)),
            "teacher_tail": (one, np.dtype(np.float32)),
        }

    @property
    def row_bytes(self) -> int:
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.arrays.values())

    @property
    def files(self) -> list[str]:
        return [f"rows-{number:05d}.array_record" for number in range(-(-self.rows // self.rows_a_file))]


def write_file(path: pathlib.Path, output: TeacherOutput, rows: Iterable[dict[str, np.ndarray]]) -> None:
    """Write records of rows ({name: array} as `output.arrays`); the file gets its name when it is complete."""
    partial = path.with_name(path.name + ".partial")
    writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
    try:
        for row in rows:
            writer.write(b"".join(_bytes(row[name], *kind) for name, kind in output.arrays.items()))
    finally:
        writer.close()
    # A rename may reach the disk before what it names does.
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _bytes(array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"a record's array is {array.dtype}{array.shape} and not {dtype}{shape}")
    return np.ascontiguousarray(array).tobytes()


def read_output(directory: str | os.PathLike[str]) -> TeacherOutput:
    """What a complete directory holds; HypenetError where there is none or it is not complete."""
    path = pathlib.Path(directory) / META
    if not path.is_file():
        raise HypenetError(f"{directory} holds no complete teacher output; run `hypenet cache-teacher` to its end")
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise HypenetError(f"{path} is of another format than {FORMAT}; cache the teacher's output again")
        return TeacherOutput(**values)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HypenetError(f"{path} is broken ({error}); cache the teacher's output again") from None


def check_same(directory: str | os.PathLike[str], found: TeacherOutput, wanted: TeacherOutput) -> None:
    """Raise HypenetError unless what was found serves for what is wanted: the same numbers for all wanted rows."""
    meaning = {
        "teacher": "the teacher's config, weights or dtype",
        "data": "the packed tokens",
        "start_token": "the first token of the stage",
        "seq_len": "the length of a row",
        "dtype": "the dtype",
    }
    for name, words in meaning.items():
        held, asked = getattr(found, name), getattr(wanted, name)
        if held != asked:
            raise HypenetError(
                f"the teacher output in {directory} is of another run: {words} ({name}) is {held!r} there and "
                f"{asked!r} here; cache it again or set teacher_output=live"
            )
    if found.rows < wanted.rows:
        raise HypenetError(
            f"the teacher output in {directory} has {found.rows} rows and the stage reads {wanted.rows}; cache it again"
        )


class TeacherRows:
    """The arrays of rows by their number: `rows([3, 0])["teacher_hidden"]` is [2, T, D]. Picklable.

    Raises HypenetError for a directory that is not complete.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.output = read_output(directory)
        files = [pathlib.Path(directory) / name for name in self.output.files]
        for file in files:
            if not file.is_file():
                raise HypenetError(f"{file} is missing; cache the teacher's output again")
        self._records = Records(files, "remove the directory and cache the teacher's output again")
        if len(self._records) != self.output.rows:
            raise HypenetError(
                f"{directory} has {len(self._records)} records and not {self.output.rows}; cache the output again"
            )

    def __call__(self, rows_B: np.ndarray) -> dict[str, np.ndarray]:
        records = self._records([int(row) for row in rows_B])
        found, start = {}, 0
        for name, (shape, dtype) in self.output.arrays.items():
            count = int(np.prod(shape))
            parts = [np.frombuffer(record, dtype, count, start).reshape(shape) for record in records]
            found[name] = np.stack(parts)
            start += count * dtype.itemsize
        return found
