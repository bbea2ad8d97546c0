"""Synthetic documents that teach retrieval from the context: facts, then questions about them with their answers.

For training, never for evaluation: keys and values are random in every document, so nothing can be memorised. The
styles run from the densest signal to the test itself:

    repeat      a random string, again and again (induction)
    stream      "key value" lines in which earlier keys return
    pairs       a list of pairs, then all of them asked in another order
    needles     RULER's needle sentences close together, asked in short and in full
    sentences   facts in other wordings within noise or prose, then questions
    prose       the same within prose alone, so that RULER's noise lines are new to a model; only where it is asked for
    facts       facts in many wordings within noise of many kinds (`retrieval_facts.py`); only where it is asked for
    ruler       RULER's NIAH prompt word for word (arXiv 2404.06654): facts within noise or prose, then questions

The wordings of RULER are data, kept as they are, so that a model trained here meets the test's format.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
import string
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence

from hypenet_jax.data.retrieval_facts import write_facts
from hypenet_jax.data.stdlib_docs import stdlib_documents
from hypenet_jax.errors import HypenetError

# The dense styles are where a model learns to retrieve at all; the test's own format follows quickly.
STYLES: Mapping[str, float] = {
    "ruler": 0.15,
    "needles": 0.2,
    "sentences": 0.05,
    "pairs": 0.25,
    "stream": 0.2,
    "repeat": 0.15,
    "prose": 0.0,
    "facts": 0.0,
}
MIN_CHARS = 256

_NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
_NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
_SHORT_QUERY = "The special magic {kind} for {key} mentioned in the provided text is {value}"
_QUERY = "What is the special magic {kind} for {key} mentioned in the provided text? " + _SHORT_QUERY
_HEADER = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards."
)
_HEADER_MANY = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards."
)
_NEEDLE_QUERIES = (
    _QUERY,
    _SHORT_QUERY,
    "The special magic {kind} for {key} is {value}",
    "What is the special magic {kind} for {key}? {value}",
)
_WORDINGS = (
    ("The {kind} of {key} is {value}.", "What is the {kind} of {key}? {value}"),
    ("Remember that {key} has the {kind} {value}.", "Question: which {kind} does {key} have? Answer: {value}"),
    ("The secret {kind} for {key} is {value}.", "Q: What is the secret {kind} for {key}?\nA: {value}"),
    ("We gave {value} to {key}.", "What did we give to {key}? We gave {value}"),
    ("{key} goes with {value}.", "{key} goes with {value}"),
    ("Note: {key} = {value}.", "According to the text, {key} = {value}"),
    ("Whoever asks for {key} shall be told {value}.", "I ask for {key}. You say {value}"),
)
_PAIRS = (
    ("{key}: {value}", "{key}: {value}"),
    ("{key} = {value}", "{key} = {value}"),
    ("{key} -> {value}", "{key} -> {value}"),
    ("{key} is {value}.", "What is {key}? {value}"),
    ("{value} belongs to {key}.", "{key}: {value}"),
    ("{key},{value}", "{key},{value}"),
)


def retrieval_documents(
    count: int,
    seed: int,
    max_chars: int,
    styles: Sequence[str] | Mapping[str, float] | None = None,
    haystack: str | None = None,
) -> Iterator[str]:
    """`count` documents of MIN_CHARS..max_chars characters (lengths uniform; a text ends where no fact fits any more).

    Document i depends on (seed, i, max_chars, styles, haystack) alone. styles: names of STYLES, equally often, or
    weights by name; default STYLES. haystack: prose around the needles, by default the standard library's
    documentation (its ASCII sentences, so that characters are bytes). Raises HypenetError for a wrong argument.
    """
    if count < 1:
        raise HypenetError(f"retrieval count is {count}; it must be at least 1")
    if max_chars < MIN_CHARS:
        raise HypenetError(f"retrieval max_chars is {max_chars}; it must be at least {MIN_CHARS}")
    weights = _weights(styles)
    sentences = _default_sentences() if haystack is None else _sentences(haystack)
    if not sentences:
        raise HypenetError("retrieval haystack holds no sentence; give a text with words in it")
    return _documents(count, seed, max_chars, weights, sentences)


def _weights(styles: Sequence[str] | Mapping[str, float] | None) -> dict[str, float]:
    if isinstance(styles, str):
        styles = (styles,)
    weights = dict(styles if isinstance(styles, Mapping) else dict.fromkeys(styles or (), 1.0)) or dict(STYLES)
    for name, weight in weights.items():
        if name not in _WRITERS:
            raise HypenetError(f"retrieval style {name!r} is unknown; use {', '.join(STYLES)}")
        if not 0 <= weight < float("inf"):
            raise HypenetError(f"retrieval style {name!r} has the weight {weight}; it must be at least 0 and finite")
    if not sum(weights.values()) > 0:
        raise HypenetError(f"retrieval style weights are {weights}; one must be above 0")
    return weights


def _documents(
    count: int, seed: int, max_chars: int, weights: Mapping[str, float], sentences: Sequence[str]
) -> Iterator[str]:
    for index in range(count):
        rng = random.Random(f"retrieval {seed} {index}")
        name = rng.choices(list(weights), list(weights.values()))[0]
        page = _Page(rng, rng.randint(MIN_CHARS, max_chars), sentences)
        # A long key can leave no room for a single fact: pairs are the shortest way to write one.
        yield _WRITERS[name](page) or _write_pairs(page)


@functools.cache
def key_words() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(adjectives, nouns) of the wonderwords lists in ASCII, sorted; RULER's keys are "adjective-noun"."""
    # Imported here: only retrieval documents need the lists.
    import wonderwords

    words = wonderwords.RandomWord()
    adjectives, nouns = (
        tuple(sorted({word for word in words.filter(include_categories=[kind]) if word.isascii()}))
        for kind in ("adjectives", "nouns")
    )
    return adjectives, nouns


@functools.cache
def _default_sentences() -> tuple[str, ...]:
    return tuple(sentence for text in stdlib_documents() for sentence in _sentences(text) if sentence.isascii())


def _sentences(text: str) -> list[str]:
    """Sentences with their white space collapsed, as RULER does to its essays."""
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text).strip()) if sentence]


def _write_ruler(page: _Page) -> str:
    rng = page.rng
    wanted, header = rng.choice((1, 1, 2, 2, 3, 4)), rng.random() < 0.5
    kind = page.value_kind()
    # A short page may hold the test only without its opening, or with a short value.
    attempts = ((kind, header), (kind, False), ("number", False))
    for kind, header in attempts:
        reserve = len(_HEADER_MANY.format(kind=kind)) + 1 if header else 0
        facts, queries = page.facts(wanted, _NEEDLE, (_QUERY,), kind, reserve)
        if facts:
            break
    else:
        return ""
    if rng.random() < 0.5:
        # The needles that nobody asks for make the key, not the wording, point at the answer.
        queries = queries[: rng.randint(1, len(queries))]
    opening = []
    if header:
        opening = [(_HEADER if len(queries) == 1 else _HEADER_MANY).format(kind=kind)]
    return page.assemble(opening, facts, queries)


def _write_needles(page: _Page) -> str:
    rng = page.rng
    share = rng.choice((0.6, 0.8, 1.0, 1.0))
    wanted = max(2, int(page.length * share) // 180)
    facts, queries = page.facts(rng.randint(2, wanted + 1), _NEEDLE, _NEEDLE_QUERIES, page.value_kind(), 0)
    return page.assemble([], facts, queries) if facts else ""


def _write_sentences(page: _Page, noisy: float = 0.5) -> str:
    rng = page.rng
    needle, query = rng.choice(_WORDINGS)
    wanted = rng.randint(1, max(2, page.length // 160))
    facts, queries = page.facts(wanted, needle, (query,), page.value_kind(), 0)
    return page.assemble([], facts, queries, noisy) if facts else ""


def _write_pairs(page: _Page) -> str:
    rng = page.rng
    pair, query = rng.choice(_PAIRS)
    key, value = page.short_key(), page.short_value()
    facts: dict[str, str] = {}
    listed: list[str] = []
    room = int(page.length * rng.uniform(0.3, 0.6))
    while room > 0:
        fact = {"key": page.fresh(key, facts), "value": value()}
        listed.append(pair.format(**fact))
        facts[fact["key"]] = query.format(**fact)
        room -= len(listed[-1]) + 1
    return _until(page.length, listed, _endless(rng, list(facts.values())))


def _write_stream(page: _Page) -> str:
    rng = page.rng
    key, value = page.short_key(), page.short_value()
    form = rng.choice(("{} {}", "{}:{}", "{}={}", "{} is {}"))
    again = rng.uniform(0.4, 0.7)

    def lines() -> Iterator[str]:
        facts: dict[str, str] = {}
        while True:
            if not facts or rng.random() > again:
                fresh = page.fresh(key, facts)
                facts[fresh] = form.format(fresh, value())
                yield facts[fresh]
            else:
                yield rng.choice(list(facts.values()))

    return _until(page.length, [], lines())


def _write_repeat(page: _Page) -> str:
    rng = page.rng
    draw = page.short_value() if rng.random() < 0.5 else page.short_key()
    size = rng.randint(8, max(9, page.length // 3))
    text = draw()
    while len(text) < size:
        text += rng.choice((" ", "", " ", ", ")) + draw()

    def lines() -> Iterator[str]:
        yield text
        while True:
            # The whole or a run of it: the place to copy from must be found, not counted.
            start = 0 if rng.random() < 0.6 else rng.randrange(max(1, len(text) // 2))
            yield text[start:]

    return _until(page.length, [], lines())


def _endless(rng: random.Random, lines: list[str]) -> Iterator[str]:
    while True:
        yield from rng.sample(lines, len(lines))


def _until(length: int, first: list[str], lines: Iterator[str]) -> str:
    """Lines while they fit into `length` characters, each ended by a newline."""
    text = "".join(f"{line}\n" for line in first)
    for line in lines:
        if len(text) + len(line) + 1 > length:
            return text
        text += f"{line}\n"
    return text


@dataclasses.dataclass(frozen=True)
class _Page:
    """What a writer draws from: randomness, the length to fill (characters) and the prose."""

    rng: random.Random
    length: int
    sentences: Sequence[str]

    def value_kind(self) -> str:
        return self.rng.choices(("number", "uuid", "word"), (0.6, 0.25, 0.15))[0]

    def word(self) -> str:
        adjectives, nouns = key_words()
        return f"{self.rng.choice(adjectives)}-{self.rng.choice(nouns)}"

    def value(self, kind: str) -> str:
        if kind == "number":
            return str(self.rng.randint(10**6, 10**7 - 1))
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4)) if kind == "uuid" else self.word()

    def short_key(self) -> Callable[[], str]:
        rng, nouns = self.rng, key_words()[1]
        size = rng.randint(2, 6)
        return rng.choice(
            (
                self.word,
                lambda: rng.choice(nouns),
                lambda: "".join(rng.choices(string.ascii_lowercase, k=size)),
                lambda: "".join(rng.choices(string.ascii_letters + string.digits, k=size)),
            )
        )

    def short_value(self) -> Callable[[], str]:
        rng, nouns = self.rng, key_words()[1]
        size = rng.randint(2, 7)
        return rng.choice(
            (
                lambda: str(rng.randint(10**6, 10**7 - 1)),
                lambda: "".join(rng.choices(string.digits, k=size)),
                lambda: rng.choice(nouns),
                lambda: "".join(rng.choices(string.hexdigits[:16], k=size)),
                lambda: "".join(rng.choices(string.ascii_lowercase, k=size)),
            )
        )

    def fresh(self, draw: Callable[[], str], taken: Mapping[str, str]) -> str:
        """A key that the document does not hold yet: a question must have one answer."""
        for _ in range(16):
            key = draw()
            if key not in taken:
                return key
        # Two letters run out in a long document.
        return next(key for number in range(len(taken) + 1) if (key := f"{draw()}{number}") not in taken)

    def facts(
        self, wanted: int, needle: str, queries: Sequence[str], kind: str, reserve: int
    ) -> tuple[list[str], list[str]]:
        """Up to `wanted` needle sentences and an answered query of each that fit the page, queries in another order."""
        placed: dict[str, str] = {}
        needles: list[str] = []
        used = reserve
        for _ in range(wanted):
            key = self.fresh(self.word, placed)
            fact = {"kind": kind, "key": key, "value": self.value(kind)}
            sentence, query = needle.format(**fact), self.rng.choice(queries).format(**fact)
            used += len(sentence) + len(query) + 2
            if used > self.length:
                break
            needles.append(sentence)
            placed[key] = query
        return needles, self.rng.sample(list(placed.values()), len(placed))

    def assemble(self, opening: list[str], needles: list[str], queries: list[str], noisy: float = 0.5) -> str:
        """Opening lines, the haystack with the needles at random places, then the queries, one a line.

        The haystack is RULER's noise with the probability `noisy`, else prose.
        """
        room = self.length - sum(len(line) + 1 for line in (*opening, *needles, *queries))
        noise = self.rng.random() < noisy
        hay = self._noise(room) if noise else self.prose(room)
        for needle in needles:
            hay.insert(self.rng.randint(0, len(hay)), needle)
        return "".join(f"{line}\n" for line in (*opening, ("\n" if noise else " ").join(hay), *queries))

    def _noise(self, room: int) -> list[str]:
        """RULER's noise lines, then as much of one more as fits."""
        line = " ".join(_NOISE)
        lines = [line] * (room // (len(line) + 1))
        rest = ""
        for sentence in _NOISE:
            if len(lines) * (len(line) + 1) + len(rest) + len(sentence) + 2 > room:
                break
            rest = f"{rest} {sentence}".lstrip()
        return [*lines, rest] if rest else lines

    def prose(self, room: int) -> list[str]:
        """Consecutive sentences from a random place on, the last one cut between words."""
        found: list[str] = []
        start = self.rng.randrange(len(self.sentences))
        for step in range(len(self.sentences)):
            sentence = self.sentences[(start + step) % len(self.sentences)]
            if len(sentence) + 1 > room:
                cut = sentence[: max(room - 1, 0)].rpartition(" ")[0]
                return [*found, cut] if cut else found
            found.append(sentence)
            room -= len(sentence) + 1
        return found


_WRITERS: Mapping[str, Callable[[_Page], str]] = {
    "ruler": _write_ruler,
    "needles": _write_needles,
    "sentences": _write_sentences,
    "pairs": _write_pairs,
    "stream": _write_stream,
    "repeat": _write_repeat,
    "prose": functools.partial(_write_sentences, noisy=0.0),
    "facts": write_facts,
}
