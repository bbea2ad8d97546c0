"""RULER's needle-in-a-haystack tasks NIAH-Single-1, -2 and -3, made offline for any tokenizer.

Templates, word lists and rules are those of NVIDIA/RULER (arXiv 2404.06654), so that numbers compare: S1 hides a
7-digit number in noise, S2 a 7-digit number in essays, S3 a UUID in essays; the key is an "adjective-noun" pair; the
prompt ends with RULER's answer prefix. Differences: the haystack is filled to the token for every sample (RULER fits
one size in steps of 25 lines or 500 words), and sentences are found by a rule instead of NLTK (`haystack.py`).
"""

from __future__ import annotations

import dataclasses
import os
import random
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.haystack import EssayHaystack, NoiseHaystack, key_words, load_essays

TASKS = ("S1", "S2", "S3")

# RULER's tokens_to_generate of the NIAH tasks: part of the length of a sample.
ANSWER_BUDGET = 128

# The sentences of RULER's template in the form it takes for one key and one value (data, kept word for word).
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
QUESTION = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {key} mentioned in the provided text?"
)
ANSWER_PREFIX = " The special magic {kind} for {key} mentioned in the provided text is"


class TextTokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class NiahSample:
    """One prompt and its answer.

    answer_ids are the tokens of " <value>"; alternative_ids those of ": <value>", the needle's own punctuation, which
    models without instruction tuning often repeat. length counts prompt and answer budget in tokens and is what the
    sample was asked to fill; depth is in percent.
    """

    prompt_ids: tuple[int, ...]
    answer_text: str
    answer_ids: tuple[int, ...]
    task: str
    length: int
    depth: float
    alternative_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Needle:
    kind: str
    key: str
    value: str
    draw: float

    @property
    def sentence(self) -> str:
        return NEEDLE.format(kind=self.kind, key=self.key, value=self.value)


def make_samples(
    task: str,
    tokenizer: TextTokenizer,
    length: int,
    count: int,
    depths: Sequence[float] | None = None,
    seed: int = 42,
    essays: str | os.PathLike | Sequence[str] | None = None,
    *,
    answer_budget: int = ANSWER_BUDGET,
    wrap: Callable[[str], str] | None = None,
    first_ids: Sequence[int] = (),
) -> list[NiahSample]:
    """`count` samples of a task, each filling `length` tokens including `answer_budget`.

    task: "S1", "S2", "S3" (also "S2-like", "S3-like"). S2 and S3 need `essays` (see `haystack.load_essays`); over
      anything but Paul Graham's essays the samples are named "S2-like" and "S3-like".
    depths: percents in 0..100; sample i takes depths[i % len(depths)], so count is the total over all depths. None
      is RULER's rule: a random line for S1, a random one of 40 evenly spaced depths for S2 and S3.
    seed: keys, values and random depths depend on (task, seed) alone, so every length asks the same questions.
    wrap: puts a chat template around the question; the answer prefix follows it, as in RULER.
    first_ids: tokens before the prompt (a BOS token), counted in the length.
    Raises HypenetError when a sample cannot fit, naming the smallest length that does.
    """
    name = task.removesuffix("-like")
    _check(name, task, count, depths, answer_budget)
    name, haystack = _haystack(name, essays)
    wrap = wrap or (lambda question: question)
    needles = _draw_needles(name, count, seed)

    def encode(needle: _Needle, size: int, depth: float | None) -> tuple[list[int], float]:
        context, placed = haystack.context(needle.sentence, size, depth, needle.draw)
        question = QUESTION.format(kind=needle.kind, key=needle.key, context=context)
        prefix = ANSWER_PREFIX.format(kind=needle.kind, key=needle.key)
        return [*first_ids, *tokenizer.encode(wrap(question) + prefix)], placed

    depth_of = [depths[i % len(depths)] if depths else None for i in range(count)]
    smallest = max(len(encode(n, 1, d)[0]) for n, d in zip(needles, depth_of, strict=True)) + answer_budget
    if length < smallest:
        raise HypenetError(
            f"length {length} is too short for {name} with this tokenizer and an answer_budget of {answer_budget}; "
            f"the smallest is {smallest}"
        )
    samples, guess = [], 0
    for needle, depth in zip(needles, depth_of, strict=True):

        def at(size: int, needle: _Needle = needle, depth: float | None = depth) -> tuple[list[int], float]:
            return encode(needle, size, depth)

        (ids, placed), guess = _fill(at, length - answer_budget, guess)
        answer, alternative = (_answer_ids(tokenizer, needle, lead, answer_budget) for lead in (" ", ": "))
        samples.append(NiahSample(tuple(ids), needle.value, answer, name, length, float(placed), alternative))
    return samples


def _check(name: str, task: str, count: int, depths: Sequence[float] | None, answer_budget: int) -> None:
    if name not in TASKS:
        raise HypenetError(f"task {task!r} is unknown; use S1, S2 or S3")
    if count < 1:
        raise HypenetError(f"count is {count}; ask for at least 1 sample")
    if answer_budget < 1:
        raise HypenetError(f"answer_budget is {answer_budget}; give at least 1 token")
    if depths is not None and not len(depths):
        raise HypenetError("depths are empty; give percents in 0..100, or None for RULER's rule")
    for depth in depths if depths is not None else ():
        if not 0 <= depth <= 100:
            raise HypenetError(f"depth {depth} is outside 0..100; depths are percents")


def _draw_needles(name: str, count: int, seed: int) -> list[_Needle]:
    rng = random.Random(f"{name.removesuffix('-like')} {seed}")
    adjectives, nouns = key_words()
    needles = []
    for _ in range(count):
        key = f"{rng.choice(adjectives)}-{rng.choice(nouns)}"
        if name.startswith("S3"):
            kind, value = "uuid", str(uuid.UUID(int=rng.getrandbits(128), version=4))
        else:
            kind, value = "number", str(rng.randint(10**6, 10**7 - 1))
        needles.append(_Needle(kind, key, value, rng.random()))
    return needles


def _haystack(name: str, essays: Any) -> tuple[str, NoiseHaystack | EssayHaystack]:
    """The task's name, "-like" over prose that is not RULER's, and its haystack."""
    if name == "S1":
        return name, NoiseHaystack()
    text, is_ruler = load_essays(essays)
    return name if is_ruler else f"{name}-like", EssayHaystack(text)


def _answer_ids(tokenizer: TextTokenizer, needle: _Needle, lead: str, budget: int) -> tuple[int, ...]:
    # Encoded after the prefix where that leaves the prefix's tokens alone: some tokenizers mark a text's beginning.
    prefix = ANSWER_PREFIX.format(kind=needle.kind, key=needle.key)
    prefix_ids = tokenizer.encode(prefix)
    ids = tokenizer.encode(prefix + lead + needle.value)
    joined = ids[: len(prefix_ids)] == prefix_ids
    answer = tuple(ids[len(prefix_ids) :] if joined else tokenizer.encode(lead + needle.value))
    if len(answer) > budget:
        raise HypenetError(f"answer_budget {budget} is below the {len(answer)} tokens of an answer; raise it")
    return answer


def _fill(
    encode: Callable[[int], tuple[list[int], float]], limit: int, guess: int
) -> tuple[tuple[list[int], float], int]:
    """The largest haystack whose prompt has at most `limit` tokens (within 4 tokens or one unit), and its size.

    Size 1 is known to fit. Starts from `guess` (0: none) and follows the measured tokens per unit, halving the
    bracket where that stops helping: two or three encodings of the text instead of a binary search's seventeen.
    """
    low, best, high = 1, encode(1), 0
    probe = 33
    slope = (len(encode(probe)[0]) - len(best[0])) / (probe - 1)
    size = guess or low + int((limit - len(best[0])) / slope)
    for attempt in range(64):
        size = max(size, low + 1)
        if high:
            size = min(size, high - 1)
            if high - low <= 1:
                break
            if attempt > 6:
                size = (low + high) // 2
        found = encode(size)
        if len(found[0]) <= limit:
            low, best = size, found
            if limit - len(found[0]) < max(4.0, slope):
                break
        else:
            high = size
        size += int((limit - len(found[0])) / slope) or (1 if len(found[0]) <= limit else -1)
    return best, low
