"""Showing tokens as they come: whole characters only, although a token may end inside one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from hypenet_jax.data.tokenizers import Tokenizer

# The longest prefix kept back while the decoded text ends in a broken character.
LONGEST_CHARACTER = 4


def print_stream(ids: Iterable[int], tokenizer: Tokenizer, out: IO[str]) -> None:
    """Write the text of the ids to `out` as they arrive, then a newline."""
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(pending) < LONGEST_CHARACTER:
            continue
        out.write(text)
        out.flush()
        pending = []
    out.write(tokenizer.decode(pending) + "\n")
    out.flush()
