"""How a page says where its numbers come from: one wording for all pages."""

import re

from hypenet_jax.evals.report_parts import provenance

RUN = {
    "command": "hypenet <align>",
    "device": "2 x cpu",
    "versions": {"hypenet_jax": "1", "jax": "2"},
    "seconds": {"align": 30.4, "select & fit": 3900, "skipped": None},
    "processes": 1,
}


def rows(html):
    return re.findall("<tr><td>(.*?)</td><td>(.*?)</td></tr>", html)


def test_all_that_is_known():
    html = provenance(RUN, {"size": 3}, (0, 5), {"Teacher": "a & b", "Cells": ""})
    assert rows(html) == [
        ("Device", "2 x cpu"),
        ("Versions", "hypenet_jax 1, jax 2"),
        ("Wall time, align", "30 s"),
        ("Wall time, select &amp; fit", "1 h 05 min"),
        ("Wall time, together", "1 h 06 min"),
        ("Seeds", "0, 5"),
        ("Teacher", "a &amp; b"),
    ]
    assert "<h2>How this was made</h2>" in html and "<pre>hypenet &lt;align&gt;</pre>" in html
    assert "<summary>The settings</summary><pre>{\n &quot;size&quot;: 3\n}</pre>" in html


def test_one_seed_and_one_step_are_said_once():
    html = provenance({"seconds": {"train": 5.0}}, None, (0,))
    assert rows(html) == [("Wall time, train", "5 s"), ("Seed", "0")] and "settings" not in html
    assert "together" not in provenance(RUN, None, together=False)


def test_nothing_known_is_said():
    assert "Not measured:" in provenance(None, None) and rows(provenance(None, None)) == []
