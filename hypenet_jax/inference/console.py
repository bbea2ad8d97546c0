"""Showing tokens as they come: whole characters only, although a token may end inside one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from hypenet_jax.data.tokenizers import Tokenizer

# The most tokens kept back while the decoded text ends in a broken character.
LONGEST_CHARACTER = 4
# Tokens decoded before the new ones: what a token reads as depends on those before it (a leading space, mostly).
BEFORE = 8


def print_stream(ids: Iterable[int], tokenizer: Tokenizer, out: IO[str], after: Sequence[int] = ()) -> None:
    """Write the text of the ids to `out` as they arrive, then a newline. `after`: the prompt, which is not shown."""
    shown, pending = list(after)[-BEFORE:], []
    for token in ids:
        pending.append(token)
        ready = len(pending)
        if _continuation(tokenizer, shown, pending).endswith("\N{REPLACEMENT CHARACTER}"):
            # Longer than any character: the first token is broken, and those after it may begin a whole one.
            ready = 1 if ready >= LONGEST_CHARACTER else 0
        if ready:
            _write(out, _continuation(tokenizer, shown, pending[:ready]))
            shown, pending = [*shown, *pending[:ready]][-BEFORE:], pending[ready:]
    _write(out, _continuation(tokenizer, shown, pending) + "\n")


def _continuation(tokenizer: Tokenizer, shown: Sequence[int], new: Sequence[int]) -> str:
    before, both = tokenizer.decode(shown), tokenizer.decode([*shown, *new])
    return both[len(before) :] if both.startswith(before) else tokenizer.decode(new)


def _write(out: IO[str], text: str) -> None:
    # A terminal of another encoding shows a mark for what it cannot.
    encoding = getattr(out, "encoding", None) or "utf-8"
    out.write(text.encode(encoding, "replace").decode(encoding))
    out.flush()
