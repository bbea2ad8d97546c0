"""Synthetic retrieval: every question can be answered from the text before it, and documents follow from the seed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypenet_jax.data.retrieval import MIN_CHARS, STYLES, retrieval_documents
from hypenet_jax.data.retrieval_facts import QUESTIONS
from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.haystack import NOISE_LINE

NEEDLE = re.compile(r"One of the special magic (\w+)s for ([\w '-]+?) is: ([\w '-]+?)\.(?=\s|$)")
ANSWER = re.compile(
    r"[Tt]he special magic (\w+) for ([\w '-]+?)(?: mentioned in the provided text)?(?: is|\?(?! The)) ([\w '-]+)\n"
)
FULL = re.compile(
    r"What is the special magic (\w+) for (.+?) mentioned in the provided text\? "
    r"The special magic \1 for \2 mentioned in the provided text is ([\w '-]+)\n"
)


def documents(count=200, seed=0, max_chars=512, **options):
    return list(retrieval_documents(count, seed, max_chars, **options))


@given(st.integers(0, 10**6), st.integers(MIN_CHARS, 3000), st.sampled_from(sorted(STYLES)))
def test_lengths_and_alphabet(seed, max_chars, style):
    for text in documents(20, seed, max_chars, styles=[style]):
        assert 0 < len(text) <= max_chars
        assert text.isascii() and text.endswith("\n")


def test_documents_follow_from_seed_and_index_alone():
    assert documents(50, 1) == documents(80, 1)[:50]
    assert documents(50, 1) != documents(50, 2)
    assert len(set(documents(500))) == 500


def test_lengths_are_spread():
    lengths = [len(text) for text in documents(600, max_chars=1024)]
    assert min(lengths) < 350 and max(lengths) > 950
    assert 500 < sum(lengths) / len(lengths) < 700


@pytest.mark.parametrize("style", ["ruler", "needles"])
def test_needles_answer_the_questions(style):
    asked = 0
    for text in documents(300, 5, 900, styles=[style]):
        needles = NEEDLE.findall(text)
        if not needles:
            continue  # A page too short for one fact holds pairs.
        facts = {key: (kind, value) for kind, key, value in needles}
        assert len(facts) == len(needles)
        answers = ANSWER.findall(text)
        assert answers
        for kind, key, value in answers:
            assert facts[key] == (kind, value)
        asked += len(answers)
    assert asked > 300


def test_ruler_documents_are_the_test_word_for_word():
    found = documents(400, 1, 1024, styles=["ruler"])
    questions = [FULL.findall(text) for text in found]
    assert sum(map(bool, questions)) > 390
    assert {kind for row in questions for kind, _, _ in row} == {"number", "uuid", "word"}
    numbers = [value for row in questions for kind, _, value in row if kind == "number"]
    assert all(re.fullmatch(r"[1-9]\d{6}", value) for value in numbers)
    header = "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you"
    assert sum(text.startswith(header) for text in found) > 20
    noise = "\nThe grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    assert sum(noise in text for text in found) > 50
    # Some needles are distractors that nobody asks for.
    assert any(len(NEEDLE.findall(text)) > len(row) for text, row in zip(found, questions, strict=True))


def test_needles_lie_at_any_depth():
    depths = [
        found.start() / len(text)
        for text in documents(300, 2, 2048, styles=["ruler"])
        if (found := NEEDLE.search(text))
    ]
    assert min(depths) < 0.1 and max(depths) > 0.6


@pytest.mark.parametrize("style", ["pairs", "stream", "repeat"])
def test_dense_documents_repeat_several_answers(style):
    counts = []
    for text in documents(200, 4, 512, styles=[style]):
        lines = text.splitlines()
        counts.append(sum(any(line in earlier for earlier in lines[:at]) for at, line in enumerate(lines)))
    assert sum(counts) / len(counts) > (1 if style == "repeat" else 4)


def test_pairs_are_consistent():
    for text in documents(100, 6, 800, styles=["stream"]):
        lines = set(text.splitlines())
        for form in (" is ", ":", "=", " "):
            if all(form in line for line in lines):
                keys = [line.split(form)[0] for line in lines]
                break
        # Keys of two words share a first word in the plainest form.
        assert len(set(keys)) > 0.9 * len(keys)


def test_given_prose_surrounds_the_needles():
    found = documents(60, 0, 600, styles=["ruler"], haystack="Crocodiles\n sing. They dance.")
    assert any("Crocodiles sing. They dance." in text for text in found)
    assert not any("python" in text.lower() for text in found)


def test_weights_choose_styles():
    assert documents(20, styles={"ruler": 0.0, "pairs": 2.0}) == documents(20, styles=["pairs"])
    only = documents(50, 0, 512, styles={"ruler": 1.0, "pairs": 0.0})
    assert sum("special magic" in text for text in only) > 45


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"max_chars": MIN_CHARS - 1}, "max_chars is 255"),
        ({"styles": ["poem"]}, "'poem' is unknown"),
        ({"styles": {"pairs": -1.0}}, "weight -1.0"),
        ({"styles": {"pairs": 0.0}}, "must be above 0"),
        ({"haystack": " \n"}, "no sentence"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(HypenetError, match=message):
        documents(**arguments)


def test_facts_answer_their_questions_and_spell_nothing_of_the_evaluation():
    asks = [
        re.compile(re.sub(r"\\\{(what|key)\\\}", ".+", re.escape(question)).replace(r"\{value\}", "(.+)"))
        for question in QUESTIONS
    ]
    for text in documents(300, 5, 6000, styles=["facts"]):
        assert "special magic" not in text and "mentioned in the provided" not in text
        *_, before, last = text.rstrip("\n").split("\n")
        found = next(match for line in (f"{before}\n{last}", last) for ask in asks if (match := ask.fullmatch(line)))
        assert text.count(found[1]) >= 2, text


def test_prose_has_the_facts_and_questions_of_sentences_and_none_of_the_noise():
    noise = NOISE_LINE.split(". ")[0]
    sentences, prose = (documents(40, 3, 1500, styles=[style]) for style in ("sentences", "prose"))
    assert 10 < sum(noise in page for page in sentences) < 30
    assert not any(noise in page for page in prose)
    assert [page.splitlines()[-1] for page in sentences] == [page.splitlines()[-1] for page in prose]


def test_a_style_that_nobody_asks_for_changes_no_document():
    named = {name: weight for name, weight in STYLES.items() if weight}
    assert not {"facts", "prose"} & set(named)
    assert documents(80, 4) == documents(80, 4, styles=named)
