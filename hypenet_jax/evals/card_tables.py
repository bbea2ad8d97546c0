"""The markdown that a model card is made of."""

from __future__ import annotations

from collections.abc import Sequence


def section(heading: str, text: str) -> str:
    """The text below a heading."""
    return f"## {heading}\n\n{text}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells under a head, all of one length."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float | None, form: str) -> str:
    """A number by its format; nothing where there is none."""
    return "" if value is None else format(value, form)


def count(tokens: int | None) -> str:
    """A whole number with its thousands apart; nothing where there is none."""
    return number(tokens, ",")
