"""The page of a comparison, from results as `hypenet compare-architectures` leaves them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals import comparison
from hypenet_jax.evals.intervals import wilson
from hypenet_jax.evals.report import write_report
from hypenet_jax.halo.settings import EvaluateConfig, FitScaleConfig

VARIANTS = [
    {"name": "hypenet", "hybrid": True, "position": "hype", "scaling": "fit", "constant": 1.5},
    {"name": "plain", "hybrid": True, "position": "hype", "scaling": "none", "constant": 1.5},
    {"name": "transformer", "hybrid": False, "position": "rope", "scaling": "none", "constant": 1.5},
]

SETTINGS = {"evaluate": {"samples": 8}, "fit_scale": {"length": 1024}}


def result(variant, seed, right, nll):
    mixers = ["lightning", "attention"] if variant["hybrid"] else ["attention", "attention"]
    scaling = {"kind": "hype", "value": 100.0 + seed} if variant["scaling"] == "fit" else None
    return {
        "variant": variant,
        "settings": SETTINGS,
        "seed": seed,
        "network": {"mixers": mixers, "logits_scaling": scaling},
        "parameters": 1234,
        "training": {"loss": 2.0 + seed, "tokens": 4096},
        "perplexity": 3.0,
        "perplexity_by_position": [{"start": 0, "stop": 512, "nll": nll}, {"start": 512, "stop": 1024, "nll": 9.0}],
        "windows": 2,
        "niah": [
            {"task": task, "length": length, "depth": depth, "correct": right, "total": 4}
            for task in ("S1", "S2-like")
            for length in (512, 32768)
            for depth in (10.0, 90.0)
        ],
    }


@pytest.fixture
def workdir(tmp_path):
    directory = tmp_path / "tiny"
    for seed in (0, 1):
        for variant, right in zip(VARIANTS, (4, 3, 1), strict=True):
            file = directory / "results" / f"{variant['name']}-seed{seed}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result(variant, seed, right - seed, 1.0 + seed)))
    curve = directory / "runs" / "hypenet-seed0" / "metrics.jsonl"
    curve.parent.mkdir(parents=True)
    curve.write_text('{"step": 1, "loss": 5.0, "tokens": 512}\n{"step": 8, "loss": 2.0, "tokens": 4096}\n')
    config = {"variants": VARIANTS, "seeds": [0, 1], "train": {"seq_len": 512}, "data": {}, **SETTINGS}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_seeds_are_added_up_and_shown(workdir):
    lines = comparison.gather(workdir)["lines"]
    assert [line["label"] for line in lines] == ["HypeNet", "HypeNet, unscaled", "Transformer, RoPE"]
    row = lines[0]["accuracy"][0]
    assert (row["task"], row["length"], row["correct"], row["total"]) == ("S1", 512, 14, 16)
    assert (row["low"], row["high"]) == wilson(7, 8) and row["by_seed"] == [1.0, 0.75]
    assert lines[0]["loss"][0]["nll"] == 1.5 and lines[0]["loss"][0]["by_seed"] == [1.0, 2.0]
    assert lines[0]["train_loss"] == 2.5 and lines[0]["scaling"] == ["a = 100", "a = 101"]


def test_the_page_says_what_was_found(workdir):
    text = write_report(workdir).read_text()
    for words in (
        "3 variants of a network of 1.23k parameters",
        "HypeNet: needles at 32K (64× the training length)",
        "88%",
        "by seed 75% to 100%; the paper&#x27;s at this multiple, with 500M parameters: 93.5%",
        "Best of the others at 32K",
        "a = 100, a = 101",
        "2 seeds",
        "Seeds</td><td>0, 1<",
    ):
        assert words in text
    # Every line is in the figure, and the one training in its own.
    for label in ("HypeNet, unscaled", "Transformer, RoPE"):
        assert text.count(label) >= 3
    assert "hypenet-seed0" in text and "<script" not in text
    report = json.loads((workdir / "report" / "report.json").read_text())
    assert report["kind"] == "comparison" and report["train_length"] == 512


def test_a_comparison_under_way_shows_what_there_is(workdir):
    for seed in (0, 1):
        (workdir / "results" / f"hypenet-seed{seed}.json").unlink()
    found = comparison.gather(workdir)
    assert [line["place"] for line in found["lines"]] == [1, 2]
    assert "1 further variants of the config are not measured yet" in write_report(workdir).read_text()
    for file in (workdir / "results").iterdir():
        file.unlink()
    with pytest.raises(HypenetError, match="holds no result to report"):
        write_report(workdir)


def test_results_of_another_definition_of_a_name_are_left_out(workdir):
    config = json.loads((workdir / "config.json").read_text())
    config["variants"][1]["position"] = "rope"
    (workdir / "config.json").write_text(json.dumps(config))
    assert [line["place"] for line in comparison.gather(workdir)["lines"]] == [0, 2]


EVALUATE = dataclasses.asdict(EvaluateConfig(essays="essays"))
FIT = dataclasses.asdict(FitScaleConfig())
FREE = {
    "prefill_chunk": 1, "row_tokens": 9999, "batch_tokens": 1, "prompts": ["a"], "new_tokens": 1, "chat": True,
    "scale_lengths": [512], "scale_grid": [2.0],
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS[:2])
def test_results_hang_on_what_was_asked_alone(variant):
    """Every field of `evaluate` and `fit_scale` is free or makes another result."""
    own = json.loads(json.dumps({"evaluate": EVALUATE, "fit_scale": FIT}))
    found = {"variant": variant, "settings": own}
    assert comparison.is_of(found, variant, own) and not comparison.is_of({"variant": variant}, variant, own)
    assert not comparison.is_of(found | {"settings": []}, variant, own)
    for name in EVALUATE:
        changed = own | {"evaluate": own["evaluate"] | {name: FREE.get(name, "another")}}
        assert comparison.is_of(found, variant, changed) == (name in FREE), name
    for name in FIT:
        changed = own | {"fit_scale": own["fit_scale"] | {name: 77}}
        assert comparison.is_of(found, variant, changed) == (variant["scaling"] != "fit" or name == "batch_size"), name
    # A constant scale is of the variant that has one.
    assert comparison.is_of(found, variant | {"constant": 2.0}, own)
    constant = variant | {"scaling": "constant"}
    assert not comparison.is_of(found | {"variant": constant}, constant | {"constant": 2.0}, own)


def test_variants_of_one_kind_go_by_their_names(workdir):
    config = json.loads((workdir / "config.json").read_text())
    config["variants"][1]["scaling"] = "fit"
    (workdir / "config.json").write_text(json.dumps(config))
    for seed in (0, 1):
        file = workdir / "results" / f"plain-seed{seed}.json"
        file.write_text(json.dumps(result(config["variants"][1], seed, 3 - seed, 1.0)))
    labels = [line["label"] for line in comparison.gather(workdir)["lines"]]
    assert labels == ["hypenet", "plain", "Transformer, RoPE"]


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"scaling": "constant"}, "HypeNet, constant 1.5"),
        ({"position": "nope"}, "Hybrid, all NoPE, scaled"),
        ({"position": "attention_rope", "scaling": "none"}, "Hybrid, RoPE in attention alone"),
        ({"position": "rope", "scaling": "none"}, "Hybrid, all RoPE"),
    ],
)
def test_labels(changes, label):
    assert comparison.label(VARIANTS[0] | changes) == label
