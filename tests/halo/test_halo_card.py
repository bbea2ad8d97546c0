"""The model card of a conversion holds the figures of its files, follows the evaluation, and never an edited card."""

import json
import shutil

import numpy as np
import pytest

import hypenet_jax as hn
from hypenet_jax.cli import main
from hypenet_jax.evals.card import run_card
from hypenet_jax.evals.card_training import objective
from hypenet_jax.evals.intervals import wilson
from hypenet_jax.evals.report import write_report
from hypenet_jax.halo.workdir import read_json
from hypenet_jax.hub.card import CARD, front_matter, is_ours

pytestmark = pytest.mark.usefixtures("on_one_device")


def rows_of(text, heading):
    """{first cells: other cells} of the table below a heading."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture
def text(finished):
    return (finished / "export" / CARD).read_text()


def test_scores_are_those_of_eval_json(finished, text):
    found = read_json(finished / "eval.json")
    names = ["teacher", "student", "student without scaling"]
    models = [found["models"][name] for name in ("teacher", "student", "student_unscaled")]
    head, _, first, *buckets = rows_of(text, "Perplexity")
    assert head[1:] == names
    assert first[1:] == [f"{model['perplexity']:.3f}" for model in models]
    assert [row[1:] for row in buckets] == [
        [f"{model['perplexity_by_position'][i]['nll']:.4f}" for model in models] for i in range(len(buckets))
    ]
    assert len(buckets) == len(models[0]["perplexity_by_position"]) > 0
    head, _, needles = rows_of(text, "Needles in a haystack")
    assert head == ["task", "length", *names] and needles[:2] == ["S1", "512"]
    for cell, model in zip(needles[2:], models, strict=True):
        right, total = (sum(row[name] for row in model["niah"]) for name in ("correct", "total"))
        low, high = (100 * share for share in wilson(right, total))
        assert cell == f"{right} of {total}, {100 * right / total:.0f}% ({low:.0f} to {high:.0f})"


def test_the_run_is_told(finished, text, convert_config, byte_teacher, documents_file):
    front = front_matter(text)
    assert front["base_model"] == byte_teacher.name and front["pipeline_tag"] == "text-generation"
    assert "license" not in front and "- lightning-attention\n" in text
    assert is_ours(text) and "# HypeNet out of teacher\n" in text and f"`{documents_file}`" in text
    packed = read_json(finished / "data/train/meta.json")
    assert f"to train on: {packed['tokens']:,} tokens of {packed['documents']:,} documents" in text
    # What was read: 5 + 5 + 4 steps of 4 rows of 64 tokens, whatever the pack holds.
    read = f"3,584 tokens (align 1,280, distill 1,280, finetune 1,024), {3584 / packed['tokens']:.3g} times the text"
    assert f"- trained on: {read}" in text
    stages = rows_of(text, "Training")[2:]
    for row, (name, steps) in zip(stages, {"align": 5, "distill": 5, "finetune": 4}.items(), strict=True):
        lines = (finished / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert row[0].startswith(f"{name} (") and row[1:4] == [str(steps), "4 x 64", f"{steps * 4 * 64:,}"]
        assert row[5] == f"{records[0]['loss']:.4f} to {records[-1]['loss']:.4f}"
    goals = [row[0] for row in stages]
    assert goals[0] == "align (hidden-state alignment: MSE between the mixers' outputs)"
    assert goals[1] == "distill (distillation: KL(teacher, student) over the whole vocabulary)"
    assert goals[2] == "finetune (long-context finetune: next-token cross-entropy)"
    assert stages[1][4] == "0.002 to 1e-05, cosine, warm-up 1"
    chosen = read_json(finished / "select.json")
    assert f"attention kept in layers {chosen['layers'][0]} (counted from 0), method `kl-ls`" in text
    assert f"a = {read_json(finished / 'fit_scale.json')['a']:g}, fitted on 3 held-out documents of 128 tokens" in text
    assert f"hypenet convert --config {convert_config} --workdir {finished}\n" in text
    versions = read_json(finished / "run.json")["versions"]
    assert f"jax {versions['jax']}" in text and f"hypenet_jax {hn.__version__}" in text


def test_what_was_not_done_is_absent(finished, tmp_path):
    """Before the evaluation, and from Python, where nobody has typed a command."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy, ignore=lambda _, names: {*names} & {"eval.json", "export", "finetune"})
    text = run_card(copy, hn.load(finished / "export")[0].config, "float32")
    for absent in ("Needles", "Perplexity", "finetune (", "```bash", "license", "None", "nan"):
        assert absent not in text
    assert "distill (" in text and "## Attention scaling" in text


def test_a_sharper_a_than_the_best_is_told(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy, ignore=lambda _, names: {*names} & {"export"})
    fitted = read_json(copy / "fit_scale.json")
    (copy / "fit_scale.json").write_text(json.dumps(fitted | {"a": 15.0, "best": 20.0, "tolerance": 0.01}))
    text = run_card(copy, hn.load(finished / "export")[0].config, "float32")
    sharper = "a = 15 (the smallest that loses at most 0.01 nats against the best, 20), fitted on 3 held-out documents"
    assert sharper in text
    page = write_report(copy).read_text()
    assert "Best a by loss" in page and "Loss given up for a smaller a, at most" in page
    assert "Best a by loss" not in (finished / "report" / "index.html").read_text()


def test_export_evaluate_and_an_edited_card(finished, convert_config, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "export")
    (copy / "eval.json").unlink()
    words = ["--config", str(convert_config), "--workdir", str(copy)]
    sets = ["--set", "evaluate.lengths=[480]", "--set", "evaluate.samples=1", "--set", "evaluate.prompts=[]"]
    assert main(["export", *words]) == 0
    card = copy / "export" / CARD
    assert "Needles" not in card.read_text()
    assert main(["evaluate", *words, *sets]) == 0
    assert rows_of(card.read_text(), "Needles in a haystack")[2][:2] == ["S1", "480"]
    assert "--set 'evaluate.lengths=[480]' --set evaluate.samples=1" in card.read_text()
    model, params = hn.load(copy / "export")
    np.testing.assert_array_equal(params["embedding"], hn.load(finished / "export")[1]["embedding"])

    card.write_text(card.read_text() + "My notes.\n")
    edited = card.read_text()
    capsys.readouterr()
    assert main(["evaluate", *words, *sets]) == 0
    assert f"{card} was edited and is left as it is" in capsys.readouterr().err
    assert main(["export", *words]) == 0
    assert card.read_text() == edited
    assert not [path for path in copy.iterdir() if "partial" in path.name]


KL, CE = "KL(teacher, student) over the whole vocabulary", "next-token cross-entropy"


@pytest.mark.parametrize(
    ("stage", "config", "checkpoint", "words"),
    [
        ("distill", {}, {}, [f"distillation: {KL}"]),
        ("distill", {"objective": {"ce_weight": 0.25}}, {}, [f"0.75 x {KL} + 0.25 x {CE}"]),
        ("distill", {"objective": {"ce_weight": 1.0}}, {}, [f"distillation: {CE}"]),
        ("distill", {"objective": {"hidden_weight": 2.0}}, {}, [f"{KL} + 2 x squared error of the last hidden states"]),
        ("distill", {"objective": {"kl_one_in": 12}}, {}, ["of one row in 12, divided by the tokens of all"]),
        # The config of the last call says "live": the checkpoint knows better.
        ("distill", {"teacher_output": "live"}, {"data": {"stream": {"teacher": "top-k of 64"}}},
         ["over the teacher's 64 likeliest tokens and all others together"]),
        ("distill", {"teacher_output": "live"}, {"config": {"teacher_output": "kept"}, "data": {"stream": {}}},
         [f"{KL}, from the teacher's kept last hidden states"]),
        ("distill", {"teacher_output": "kept"}, {"config": {"teacher_output": "live"}}, [f"distillation: {KL}"]),
        ("distill", {"data": {"documents": "joined"}}, {}, [KL, "documents of a row joined, not masked"]),
        ("align", {"data": {"documents": "joined"}}, {}, ["MSE", "documents of a row joined, not masked"]),
        ("finetune", {"finetune_loss": "completions"}, {}, [CE, "in conversations on what the assistant says alone"]),
        ("finetune", {"finetune": {"weights": "bfloat16"}}, {}, [CE, "weights and moments in bfloat16"]),
        ("train", {}, {}, [f"from random parameters: {CE}"]),
        ("train", {"start_from": "other/model"}, {}, [f"from `other/model`: {CE}"]),
    ],
)  # fmt: skip
def test_an_objective_is_what_was_minimised(stage, config, checkpoint, words):
    text = objective(stage, config, checkpoint)
    assert all(word in text for word in words), text
    assert ("likeliest" in text) == ("top-k" in str(checkpoint)) and ("kept" in text) == ("kept" in words[0])


def test_the_teachers_output_is_that_of_the_checkpoint(finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy, ignore=lambda _, names: {*names} & {"state", "export"})
    place = next((copy / "distill" / "checkpoints").glob("5/data/hypenet_checkpoint.json"))
    about = read_json(place)
    about["data"]["stream"]["teacher"] = "top-k of 8"
    place.write_text(json.dumps(about))
    config = hn.load(finished / "export")[0].config
    assert "over the teacher's 8 likeliest tokens" in run_card(copy, config, "float32")
    changed = read_json(copy / "config.json")
    changed["select"]["scores"] = "scores.json"
    (copy / "config.json").write_text(json.dumps(changed))
    assert "method `kl-ls` over the scores of `scores.json`" in run_card(copy, config, "float32")
