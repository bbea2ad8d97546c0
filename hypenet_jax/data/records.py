"""ArrayRecord files, read at random."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import grain

from hypenet_jax.errors import HypenetError

_T = TypeVar("_T")


class Records:
    """The records of files that follow each other, by their number. Picklable: files are opened on the first read.

    Raises HypenetError for a damaged file, at once or when the damage is read; `remedy` says what to do then.
    """

    def __init__(self, files: Sequence[pathlib.Path], remedy: str):
        self._files, self._remedy = files, remedy
        self._source = self._whole(lambda: grain.sources.ArrayRecordDataSource([str(file) for file in files]))

    def __len__(self) -> int:
        return len(self._source)

    def __call__(self, numbers: Sequence[int]) -> list[bytes]:
        """The records of these numbers, each at least 0 and below the length."""
        return self._whole(lambda: list(self._source.__getitems__(numbers)) if numbers else [])

    def _whole(self, read: Callable[[], _T]) -> _T:
        try:
            return read()
        # What the library raises for every kind of damage.
        except RuntimeError as error:
            directory, reason = self._files[0].parent, str(error).splitlines()[0][:200]
            raise HypenetError(f"a file in {directory} is damaged ({reason}); {self._remedy}") from None
