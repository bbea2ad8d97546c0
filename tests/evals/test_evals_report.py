"""The report shows whatever a work directory holds, says what is missing, and refuses what is broken."""

from __future__ import annotations

import html.parser
import json
import math
import re

import gguf
import numpy as np
import pytest

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals import report
from hypenet_jax.evals.intervals import wilson
from hypenet_jax.evals.report_axes import short, short_length
from hypenet_jax.evals.report_needles import depth_grid
from hypenet_jax.evals.report_style import MODEL_COLOURS, model_colours

SECTIONS = ["Network", "Training", "Layer selection", "Query scaling", "Perplexity", "Needle in a haystack", "Samples"]
FIGURES = {
    "loss align",
    "loss distill",
    "loss finetune",
    "layer scores",
    "scale fit",
    "perplexity",
    "needle accuracy",
    "needle maps",
}


def write(directory, name, value):
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def metrics(steps, torn=False):
    lines = [
        json.dumps({"step": s, "loss": 3 / s, "tokens": 64 * s, "seconds": 0.5 * s, "tokens_per_second": 125_000})
        for s in range(1, steps + 1)
    ]
    return "\n".join(lines) + ('\n{"step": 99, "lo' if torn else "\n")


def niah(share):
    return [
        {"task": task, "length": length, "depth": depth, "correct": round(4 * share), "total": 4}
        for task in ("S1", "S2-like")
        for length in (256, 512, 1024)
        for depth in (0.0, 50.0, 100.0)
    ]


@pytest.fixture
def workdir(tmp_path):
    directory = tmp_path / "run-7"
    write(directory, "config.json", {"teacher": "models/Tiny-1B", "seed": 3, "finetune": {"seq_len": 512}})
    write(directory, "align/metrics.jsonl", metrics(70))
    write(directory, "distill/metrics.jsonl", metrics(5, torn=True))
    write(directory, "finetune/metrics.jsonl", metrics(3))
    scores = {"scores": [0.5, 50.0, 0.1, 1.0], "recall": [0.5, 0.1, 0.6, 0.4], "csr": [0.5, 0.6, 0.4, 0.5]}
    write(directory, "select.json", {"method": "halo", "layers": [1], "teacher": {"recall": 0.7}} | scores)
    fit = {"a": 210.0, "grid": [10, 100, 1000], "loss": [2.5, 2.1, 2.3], "length": 2048, "documents": 4}
    write(directory, "fit_scale.json", fit | {"loss_unscaled": 2.6})
    buckets = [{"start": 0, "stop": 64, "nll": 3.0}, {"start": 64, "stop": 128, "nll": 2.0}]
    models = {
        name: {"perplexity": p, "perplexity_by_position": buckets, "niah": niah(share)}
        for name, p, share in (("student", 13.25, 0.75), ("teacher", 12.5, 1.0), ("student_unscaled", 20.125, 0.5))
    }
    samples = [{"model": "student", "prompt": "Once <upon>", "text": " a & time"}]
    write(directory, "eval.json", {"train_length": 512, "models": models, "samples": samples})
    export = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "mixer_types": ["lightning-attn", "attn"] + ["lightning-attn"] * 2,
    }
    write(directory, "export/config.json", export)
    write(
        directory,
        "run.json",
        {"command": "hypenet convert", "device": "1 x cpu", "seconds": {"align": 3661, "distill": 3599}},
    )
    return directory


class Balance(html.parser.HTMLParser):
    """Raises on a closing tag that does not match, and keeps the ids and the external references."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        self._note(dict(attributes))

    def handle_startendtag(self, tag, attributes):
        self._note(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def _note(self, attributes):
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.links += [attributes[k] for k in ("href", "src", "xlink:href") if k in attributes]


def check_page(path):
    text = path.read_text(encoding="utf-8")
    parsed = Balance()
    parsed.feed(text)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    local = [link for link in parsed.links if not link.startswith("data:image/png;base64,")]
    assert all(link[0] == "#" and link[1:] in parsed.ids for link in local)
    assert all(name in parsed.ids for name in re.findall(r"url\(#([^)]*)\)", text))
    assert not re.search(r"@import|<script|url\((?!#)", text)
    json.loads((path.parent / "report.json").read_text(), parse_constant=pytest.fail)
    return text


def test_an_answer_stands_below_its_question(workdir):
    before = report.write_report(workdir).read_text()
    assert "Once &lt;upon&gt;</span> a &amp; time" in before and "Greedy continuations" in before
    write(workdir, "config.json", {"teacher": "models/Tiny-1B", "evaluate": {"chat": True}})
    page = report.write_report(workdir)
    check_page(page)
    assert "Once &lt;upon&gt;</span><br> a &amp; time" in page.read_text()
    assert "Greedy answers" in page.read_text() and "Greedy answers" not in before


def figures(text):
    return set(re.findall(r'aria-label="([^"]*)"', text))


def test_a_whole_work_directory_is_shown(workdir):
    path = report.write_report(workdir)
    assert path == workdir / "report" / "index.html"
    text = check_page(path)
    assert figures(text) == FIGURES
    assert [h for h in re.findall("<h2>(.*?)</h2>", text) if h in SECTIONS] == SECTIONS
    made = text[text.index("How this was made") :]
    for fact in ("1 x cpu", "Wall time, align", "1 h 01 min", "together</td><td>2 h 01 min", "Seed</td><td>3<"):
        assert fact in made
    for fact in (
        "125k tokens/s",
        "Tiny-1B → HypeNet",
        "1 of 4 layers",
        "13.250",
        "20.125",
        "hypenet convert",
        "1 h 01 min",
        "a = 210",
    ):
        assert fact in text
    assert "Once &lt;upon&gt;" in text and "a &amp; time" in text and "<upon>" not in text
    assert "not measured" not in text.lower().replace("hatched: not measured", "")
    assert text.count('class="lightning"') == 3 and text.count('class="attention"') == 5
    assert sorted(p.name for p in path.parent.iterdir()) == ["index.html", "report.json"]
    assert report.write_report(workdir).read_text(encoding="utf-8") == text


def test_gathered_numbers_are_those_of_the_files(workdir):
    found = report.gather(workdir)
    assert [r["step"] for r in found["stages"]["distill"]] == [1, 2, 3, 4, 5]
    assert found["student"]["mixers"] == ["lightning", "attention", "lightning", "lightning"]
    assert found["teacher"]["mixers"] == ["attention"] * 4
    rows = {(r["model"], r["task"], r["length"]): r for r in found["accuracy"]}
    row = rows["student", "S1", 1024]
    assert (row["correct"], row["total"], row["accuracy"]) == (9, 12, 0.75)
    assert (row["low"], row["high"]) == wilson(9, 12)
    assert [r["model"] for r in found["accuracy"][::3]] == ["teacher", "student", "student_unscaled"] * 2


def write_gguf_config(path):
    """A GGUF file as far as a config reads it: the sizes, and the embedding, whose rows are the vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(4)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_tensor("token_embd.weight", np.zeros((37, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_teacher(workdir, tmp_path):
    """The GGUF file that the work directory's config names as its teacher."""
    write_gguf_config(tmp_path / "teacher.gguf")
    write(workdir, "config.json", {"teacher": str(tmp_path / "teacher.gguf")})
    export = json.loads((workdir / "export/config.json").read_text())
    write(workdir, "export/config.json", export | {"attn_use_rope": False, "attn_use_output_gate": True})
    return tmp_path / "teacher.gguf"


def test_a_gguf_teacher_has_facts_of_its_own(workdir, gguf_teacher):
    text = check_page(report.write_report(workdir))
    assert "<td>RoPE in attention layers</td><td>yes</td><td>no</td>" in text
    assert "<td>Output gate of attention</td><td>no</td><td>yes</td>" in text
    # Before the export nothing but the teacher knows its sizes.
    (workdir / "export/config.json").unlink()
    assert report.gather(workdir)["teacher"]["ffn"] == 96


@pytest.mark.parametrize("left", [None, 100, 0])
def test_a_gguf_teacher_that_cannot_be_read_costs_its_facts_alone(workdir, gguf_teacher, left):
    if left is None:
        gguf_teacher.unlink()
    else:
        gguf_teacher.write_bytes(gguf_teacher.read_bytes()[:left])
    text = check_page(report.write_report(workdir))
    assert "<td>RoPE in attention layers</td><td>–</td><td>no</td>" in text
    assert "<td>Width</td><td>64</td><td>64</td>" in text


@pytest.mark.parametrize(
    "missing,lost",
    [
        (("eval.json", "run.json"), {"perplexity", "needle accuracy", "needle maps"}),
        (("select.json", "distill/metrics.jsonl"), {"layer scores", "loss distill"}),
        (("fit_scale.json", "export/config.json", "config.json"), {"scale fit"}),
    ],
)
def test_missing_pieces_are_said_to_be_missing(workdir, missing, lost):
    for name in missing:
        (workdir / name).unlink()
    text = check_page(report.write_report(workdir))
    assert figures(text) == FIGURES - lost
    assert "trained from scratch" not in text
    for section in text.split("<h2>")[1:]:
        if not figures(section) and section.split("<")[0] in SECTIONS[1:-1]:
            assert "<b>Not measured:</b>" in section


@pytest.mark.parametrize("only", ["config.json", "eval.json", "select.json", "fit_scale.json", "align/metrics.jsonl"])
def test_any_single_piece_makes_a_report(workdir, tmp_path, only):
    alone = tmp_path / "alone"
    write(alone, only, (workdir / only).read_text())
    assert "<b>Not measured:</b>" in check_page(report.write_report(alone))


def test_layers_given_by_hand_need_no_scores(workdir):
    (workdir / "eval.json").unlink()
    write(workdir, "select.json", {"method": "given", "layers": [1]})
    text = check_page(report.write_report(workdir))
    assert "needed no scores" in text and "layer scores" not in figures(text)


def test_the_caption_of_the_scores_says_what_they_are(workdir):
    text = check_page(report.write_report(workdir))
    assert "common sense lost" in text and "with that layer alone replaced" in text
    write(workdir, "select.json", {"method": "gate-search", "layers": [1], "scores": [-2.0, 3.0, -1.0, 0.5]})
    text = check_page(report.write_report(workdir))
    assert "a learned gate between them" in text and "alone replaced" not in text
    # A table of scores made elsewhere may name a method that is not ours.
    write(workdir, "select.json", {"method": "theirs", "layers": [1], "scores": [-2.0, 3.0, -1.0, 0.5]})
    assert "Score of every layer (dark" in check_page(report.write_report(workdir))


def test_training_from_scratch_has_a_report(tmp_path):
    sizes = {"num_layers": 4, "hidden_size": 32, "attention_layers": [1, 3]}
    write(tmp_path, "config.json", {"model": sizes, "train": {"steps": 9}})
    write(tmp_path, "train/metrics.jsonl", metrics(9))
    models = {"model": {"perplexity": 3.0, "niah": niah(0.5)}}
    write(tmp_path, "eval.json", {"train_length": 256, "models": models})
    text = check_page(report.write_report(tmp_path))
    assert figures(text) == {"loss train", "needle accuracy", "needle maps"}
    assert "trained from scratch" in text and "Layer selection" not in text
    assert text.count('class="attention"') == 2 and text.count('class="lightning"') == 2


def test_numbers_that_are_not_finite_do_not_break_it(workdir):
    (workdir / "eval.json").unlink()
    write(workdir, "align/metrics.jsonl", '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 1.0}\n')
    write(
        workdir,
        "fit_scale.json",
        {"a": 10, "grid": [10, 20, 30], "loss": [1.0, math.inf, 2.0], "loss_unscaled": math.nan},
    )
    assert "loss align" in figures(check_page(report.write_report(workdir)))


def test_nothing_to_report_is_an_error(tmp_path):
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(HypenetError, match=str(directory)):
            report.write_report(directory)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name,content",
    [
        ("eval.json", "{"),
        ("select.json", "[1]"),
        ("align/metrics.jsonl", 'no\n{"step": 1}\n'),
        ("eval.json", json.dumps({"models": {"student": {"niah": [{"task": "S1"}]}}})),
        ("eval.json", json.dumps({"models": {"student": {"perplexity_by_position": [3]}}})),
    ],
)
def test_a_broken_file_is_named(workdir, name, content):
    write(workdir, name, content)
    with pytest.raises(HypenetError, match=re.escape(str(workdir / name))):
        report.write_report(workdir)
    assert not (workdir / "report").exists()


def test_a_page_of_somebody_else_is_kept(workdir):
    write(workdir, "report/index.html", "<p>mine</p>")
    with pytest.raises(HypenetError, match="not a page of hypenet_jax"):
        report.write_report(workdir)
    assert (workdir / "report/index.html").read_text() == "<p>mine</p>"


def test_depths_keep_their_rows_or_share_bins():
    rows = [{"depth": d, "length": n, "correct": 1, "total": 2} for d in (0.0, 25.0) for n in (8, 16)]
    grid, labels = depth_grid(rows[:3], [8, 16], [0.0, 25.0])
    assert labels == ["0", "25"]
    np.testing.assert_array_equal(grid, [[0.5, 0.5], [0.5, np.nan]])
    depths = [round(100 * i / 39) for i in range(40)]
    rows = [{"depth": d, "length": 8, "correct": d >= 90, "total": 1} for d in depths]
    grid, labels = depth_grid(rows, [8], depths)
    assert labels[0] == "5" and len(labels) == 10
    np.testing.assert_array_equal(grid[:, 0], [0] * 9 + [1])


def test_numbers_are_short():
    assert [short(x) for x in (0.5, 999, 1500, 3.2e8, 1e9)] == ["0.5", "999", "1.5k", "320M", "1B"]
    assert [short_length(x) for x in (512, 1024, 65536, 1 << 20, 500)] == ["512", "1K", "64K", "1M", "500"]


def test_every_measured_model_has_a_colour_of_its_own():
    names = ("teacher", "student", "student_unscaled", "tuned", "restored", "copy-3e-4", "procrustes-3e-4", "a", "b")
    colours = model_colours(names)
    assert len({colours[name] for name in names}) == len(names)
    assert colours == model_colours(reversed(names)) and colours["teacher"] == MODEL_COLOURS["teacher"]
