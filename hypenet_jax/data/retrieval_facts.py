"""Pages of facts in many wordings within noise of many kinds: what teaches to retrieve, not to know one test.

No wording here is RULER's (arXiv 2404.06654): a model that learned from these pages alone meets its needles, their
question and its answer prefix for the first time in the evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

ATTRIBUTES = (
    "access code", "phone number", "locker number", "password", "serial number", "room", "price", "address", "pin",
    "badge", "licence plate", "score", "weight", "secret word", "order number", "passphrase", "port", "version", "date",
    "account", "ticket", "colour", "owner", "size", "flight", "page", "shelf", "home town", "favourite word", "label",
)  # fmt: skip
STATEMENTS = (
    "The {what} of {key} is {value}.",
    "{key}'s {what} is {value}.",
    "For {key}, the {what} is {value}.",
    "Remember: the {what} for {key} is {value}.",
    "{value} is the {what} of {key}.",
    "Note that {key} has {value} as its {what}.",
    "The {what} for {key} was set to {value}.",
    "Somebody wrote down that the {what} of {key} was {value}.",
    "By the way, {value} is what they use as the {what} for {key}.",
    "({what} of {key}: {value})",
    "It is known that {key} goes by the {what} {value}.",
    "The {what} is {value} where {key} is concerned.",
)
QUESTIONS = (
    "What is the {what} of {key}? The {what} of {key} is {value}",
    "Question: What is {key}'s {what}?\nAnswer: {value}",
    "Q: Which {what} does {key} have?\nA: {value}",
    "Tell me the {what} for {key}. It is {value}",
    "{key}, {what}: {value}",
    "According to the text, the {what} for {key} is {value}",
    "Which {what} belongs to {key}? Its {what} is {value}",
    "User: I forgot the {what} of {key}.\nAssistant: It is {value}",
    "The {what} for {key} in the text above is {value}",
    "As stated before, {key} has the {what} {value}",
)
OPENINGS = (
    "",
    "",
    "",
    "Read the text below and remember the facts in it.",
    "There are important details in the following pages. They will be asked about at the end.",
    "Context:",
    "The document below mentions the {what} of somebody. Find it.",
)
# Sentences of one page of noise, and their longest, in characters.
NOISE_SENTENCES, NOISE_CHARACTERS = (1, 9), 120
# How many characters of the page go to a fact, sparse to dense.
SPACING = (200, 400, 1000, 4000, 16000)


class Page(Protocol):
    """What a page draws from; `retrieval` has it."""

    @property
    def rng(self) -> random.Random: ...
    @property
    def length(self) -> int: ...
    @property
    def sentences(self) -> Sequence[str]: ...
    def value_kind(self) -> str: ...
    def value(self, kind: str) -> str: ...
    def word(self) -> str: ...
    def short_key(self) -> Callable[[], str]: ...
    def short_value(self) -> Callable[[], str]: ...
    def prose(self, room: int) -> list[str]: ...


def write_facts(page: Page) -> str:
    """An opening, a haystack with facts at random places, then questions with their answers; "" where none fits."""
    rng = page.rng
    wanted = max(1, min(64, page.length // rng.choice(SPACING)))
    statement, question = rng.choice(STATEMENTS), rng.choice(QUESTIONS)
    same = rng.random() < 0.6  # one wording, or another for each fact
    key_of = page.word if rng.random() < 0.6 else page.short_key()
    kind = page.value_kind()
    value_of = (lambda: page.value(kind)) if rng.random() < 0.7 else page.short_value()
    attributes = [rng.choice(ATTRIBUTES)] if rng.random() < 0.5 else list(ATTRIBUTES)
    opening = rng.choice(OPENINGS).format(what=attributes[0])
    used = len(opening) + 1
    facts, queries, taken = [], [], set()
    for _ in range(wanted):
        what, key, value = rng.choice(attributes), key_of(), value_of()
        if (what, key) in taken:
            continue
        words = {"what": what, "key": key, "value": value}
        fact = (statement if same else rng.choice(STATEMENTS)).format(**words)
        query = (question if same else rng.choice(QUESTIONS)).format(**words)
        used += len(fact) + len(query) + 2
        if used > page.length:
            break
        taken.add((what, key))
        facts.append(fact)
        queries.append(query)
    if not facts:
        return ""
    return _assemble(page, opening, facts, rng.sample(queries, len(queries)), page.length - used)


def _assemble(page: Page, opening: str, facts: list[str], queries: list[str], room: int) -> str:
    rng = page.rng
    noise = rng.random() < 0.5
    hay = _noise(page, room) if noise else page.prose(room)
    for fact in facts:
        hay.insert(rng.randint(0, len(hay)), fact)
    lines = [opening] if opening else []
    return "".join(f"{line}\n" for line in (*lines, ("\n" if noise else " ").join(hay), *queries))


def _noise(page: Page, room: int) -> list[str]:
    """A few sentences again and again, in order or shuffled, one or all of them a line."""
    rng = page.rng
    drawn: list[str] = []
    for _ in range(rng.randint(*NOISE_SENTENCES) * 4):
        sentence = rng.choice(page.sentences)
        if len(sentence) <= NOISE_CHARACTERS:
            drawn.append(sentence)
    drawn = drawn[: rng.randint(*NOISE_SENTENCES)] or ["Nothing happens here."]
    block = " ".join(drawn)
    together, shuffled = rng.random() < 0.6, rng.random() < 0.3
    lines: list[str] = []
    while True:
        for line in [block] if together else rng.sample(drawn, len(drawn)) if shuffled else drawn:
            if len(line) + 1 > room:
                return lines
            lines.append(line)
            room -= len(line) + 1
