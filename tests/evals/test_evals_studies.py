"""Means over seeds, paired differences and token ratios of a study, and its page."""

import json
import math

import pytest

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.intervals import student_t, wilson
from hypenet_jax.evals.report_studies import write_study
from hypenet_jax.evals.studies import result, tokens_to


def cell(name, seed, kls, needles=()):
    curve = [{"tokens": 100 * i, "kl": kl, "nll": None if kl is None else kl + 1} for i, kl in enumerate(kls)]
    settings = {"variant": {"name": name}, "seed": seed}
    return {"settings": settings, "align": [], "distill": curve, "needles": list(needles), "seconds": 1.0}


VARIANTS = [
    {"name": "ours", "label": "ours", "against": None},
    {"name": "theirs", "label": "<theirs>", "against": "ours"},
]
NEEDLE = {"task": "S1", "length": 512, "correct": 3, "total": 4}
CELLS = [
    cell("ours", 0, [4.0, 2.0, 1.0], [NEEDLE]),
    cell("ours", 1, [4.0, 3.0, 1.5], [NEEDLE]),
    cell("theirs", 0, [6.0, 3.0, 2.0]),
    cell("theirs", 1, [6.0, 4.0, 2.25]),
]


def test_students_interval():
    # t(0.975; 2) = 4.302653, spread of 1, 2, 3 over sqrt(3).
    found = student_t([1.0, 2.0, 3.0])
    assert found["mean"] == 2 and found["high"] - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found["low"] == pytest.approx(4 - found["high"])
    assert student_t([5.0]) == {"mean": 5.0, "low": None, "high": None}


def test_tokens_to_a_level():
    curve = CELLS[0]["distill"]
    assert tokens_to(curve, "kl", 4.5) == 0 and tokens_to(curve, "kl", 1.0) == 200
    assert tokens_to(curve, "kl", 1.5) == pytest.approx(150) and tokens_to(curve, "kl", 0.5) is None
    assert tokens_to(cell("a", 0, [2.0, None])["distill"], "kl", 1.0) is None


def test_summary():
    found = result("toy", "Which?", VARIANTS, CELLS)
    ours, theirs = found["summary"]
    assert found["seeds"] == [0, 1] and ours["difference"] == {} and theirs["final"]["kl"]["mean"] == 2.125
    # Seed by seed: 2 - 1 and 2.25 - 1.5.
    assert theirs["difference"]["kl"] == student_t([1.0, 0.75])
    # To 2.0 theirs takes 200 tokens and ours 100; to 2.25 theirs 200 and ours 150.
    assert math.log(theirs["tokens"]["kl"]["mean"]) == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)
    assert "nll" not in theirs["tokens"]
    turned = [dict(VARIANTS[0], against="theirs"), dict(VARIANTS[1], against=None)]
    mirrored = result("toy", "Which?", turned, CELLS)["summary"][0]["tokens"]["kl"]
    flat = [cell("ours", 0, [1.0, 2.0, 1.5]), *CELLS[1:]]
    assert "kl" not in result("toy", "Which?", VARIANTS, flat)["summary"][1]["tokens"], "seed 0 starts below its end"
    assert mirrored["mean"] == pytest.approx(1 / theirs["tokens"]["kl"]["mean"])
    assert ours["needles"][0]["correct"] == 6 and theirs["needles"] == []
    assert (ours["needles"][0]["low"], ours["needles"][0]["high"]) == wilson(3, 4)


def test_a_cell_that_diverged():
    found = result("toy", "Which?", VARIANTS, [*CELLS[:2], CELLS[2], cell("theirs", 1, [6.0, None])])
    assert found["summary"][1]["diverged"] == 1 and found["summary"][1]["difference"]["kl"]["low"] is None
    page = result("toy", "Which?", VARIANTS, [*CELLS[:2], *(cell("theirs", s, [None]) for s in (0, 1))])
    assert page["summary"][1]["final"] == {} and page["summary"][1]["diverged"] == 2


def test_the_page(tmp_path):
    about: dict = {"device": "1 x cpu", "versions": {"jax": "0"}, "command": "hypenet ablate", "seconds": 4.0}
    about |= {"layers": [1], "config": {"teacher": "t", "ablate": {"seeds": 2}}}
    found = result("toy", "Which & why?", VARIANTS, CELLS) | about
    (tmp_path / "result.json").write_text(json.dumps(found))
    text = write_study(tmp_path).read_text()
    for words in (
        "Which &amp; why?",
        "&lt;theirs&gt;",
        "1 x cpu",
        "hypenet ablate",
        "6/8",
        "<svg",
        "Wall time, all cells</td><td>4 s",
        "Seeds</td><td>0, 1<",
    ):
        assert words in text, words
    write_study(tmp_path)
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(HypenetError, match="is not a page of hypenet_jax"):
        write_study(tmp_path)
    (tmp_path / "result.json").unlink()
    with pytest.raises(HypenetError, match="run `hypenet ablate` again"):
        write_study(tmp_path)
