"""`hypenet pretrain`: a Transformer and HypeNets from scratch, interrupted and not."""

import json
import os
import signal

import jax
import numpy as np
import pytest

import hypenet_jax as hn
from hypenet_jax.cli import main
from hypenet_jax.config import load_config
from hypenet_jax.data.tokenizers import byte_tokenizer
from hypenet_jax.errors import HypenetError
from hypenet_jax.evals import suite
from hypenet_jax.halo.pretrain import network
from hypenet_jax.halo.settings import NetworkConfig
from hypenet_jax.halo.workdir import read_json
from hypenet_jax.model.config import POSITIONS
from hypenet_jax.train import preemption
from hypenet_jax.train.metrics import Reporter

pytestmark = pytest.mark.usefixtures("on_one_device")

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
}  # fmt: skip
PRETRAIN = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.dtype = "float32"
    config.model = dict({sizes!r}, attention_layers=(1,), position="hype", logits_scaling=50.0)
    config.data = dict(sources=({documents!r},), heldout_share=0.3)
    config.train = dict(
        steps=6, batch_size=4, seq_len=64, peak_lr=1e-2, end_lr=1e-4, warmup_steps=1, log_every=1, checkpoint_every=4,
    )
    config.evaluate = dict(
        tasks=("S1",), lengths=(512,), samples=2, answer_budget=16, alternatives=False, perplexity_length=128,
        perplexity_documents=2, batch_tokens=1024, prompts=("One of the",), new_tokens=4,
    )
    return config
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory, documents_file):
    file = tmp_path_factory.mktemp("pretrain") / "scratch.py"
    file.write_text(PRETRAIN.format(sizes=SIZES, documents=str(documents_file)))
    return file


def run(program, directory, *settings):
    flags = [word for setting in settings for word in ("--set", setting)]
    return main(["pretrain", "--config", str(program), "--workdir", str(directory), *flags])


def test_a_hypenet_from_scratch_stopped_and_continued(program, tmp_path, exported, stage_records, monkeypatch, capsys):
    assert run(program, tmp_path / "whole") == 0
    model, params = hn.load(tmp_path / "whole" / "export")
    assert model.config.mixers == ("lightning", "attention") and model.config.logits_scaling.value == 50.0
    records = stage_records(tmp_path / "whole" / "train")
    assert records[-1]["loss"] < records[0]["loss"] - 0.2
    found = json.loads((tmp_path / "whole" / "eval.json").read_text())
    assert list(found["models"]) == ["model"] and found["samples"][0]["prompt"] == "One of the"
    # Training goes without the scaling of inference: the network in the checkpoint has none.
    assert hn.load(tmp_path / "whole" / "train")[0].config.logits_scaling is None

    log = Reporter.log

    def stop_at_two(self, record):
        log(self, record)
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(Reporter, "log", stop_at_two)
        run(program, tmp_path / "stopped")
    assert stopped.value.code == 75
    assert "stopped at step" in capsys.readouterr().err
    assert not (tmp_path / "stopped" / "export").exists()
    assert run(program, tmp_path / "stopped") == 0
    assert "train: continuing from step" in capsys.readouterr().err
    assert exported(tmp_path / "stopped") == exported(tmp_path / "whole")
    card = (tmp_path / "whole" / "export" / "README.md").read_text()
    assert "trained from scratch" in card and "## Perplexity" in card and "| train (from random parameters" in card
    assert "teacher" not in card and f"hypenet pretrain --config {program}" in card
    assert stage_records(tmp_path / "stopped" / "train") == records

    assert run(program, tmp_path / "whole") == 0
    assert "step 1/6" not in capsys.readouterr().err


@pytest.mark.parametrize("processes", [1, 2])
def test_an_evaluation_that_is_stopped_goes_on_with_the_next_cell(
    program, tmp_path, monkeypatch, capsys, of_two_processes, processes
):
    """SIGTERM in the first of two cells, to a process alone and to one of several: it is finished and kept."""
    settings, needles, asked = ("train.steps=2", "evaluate.lengths=[500, 512]"), suite.needles, []
    if processes == 1:
        monkeypatch.setattr(preemption, "jax", jax)

    def counted(*arguments):
        asked.append(arguments[5])
        if len(asked) == 1:
            of_two_processes.asked = True
            if processes == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return needles(*arguments)

    monkeypatch.setattr(suite, "needles", counted)
    with pytest.raises(SystemExit) as stopped:
        run(program, tmp_path / "run", *settings)
    assert stopped.value.code == 75 and asked == [500]
    assert "evaluate: stopped and saved; the same command continues" in capsys.readouterr().err
    kept = read_json(tmp_path / "run" / "eval.json")
    assert kept["models"] == {} and kept["begun"]["model"]["cells"] == [["S1", 500]]
    of_two_processes.asked = False
    assert run(program, tmp_path / "run", *settings) == 0 and asked == [500, 512]
    found = read_json(tmp_path / "run" / "eval.json")
    assert found["models"]["model"]["perplexity"] == kept["begun"]["model"]["perplexity"]
    assert [row["length"] for row in found["models"]["model"]["niah"]] == [500, 512]
    assert "begun" not in found and len(found["samples"]) == 1
    assert run(program, tmp_path / "run", *settings) == 0 and asked == [500, 512]


def test_a_transformer_from_scratch_is_a_teacher(program, tmp_path):
    plain = ("model.attention_layers=None", "model.position=rope", "model.logits_scaling=None")
    few = ("train.steps=2", "evaluate.tasks=[]", "evaluate.prompts=[]")
    assert run(program, tmp_path / "teacher", *plain, *few) == 0
    model, params = hn.load(tmp_path / "teacher" / "export")
    assert model.config.family == "qwen3" and model.config.attention_layers == (0, 1)
    student, sparams = hn.convert(model, params, [0], start="calibrated")
    assert np.isfinite(student.logits(sparams, np.arange(16, dtype=np.int32)[None])).all()


def test_a_card_says_what_a_training_started_from(program, tmp_path):
    few = ("train.steps=2", "evaluate.tasks=[]", "evaluate.prompts=[]")
    assert run(program, tmp_path / "first", *few) == 0
    start = tmp_path / "first" / "train"
    assert run(program, tmp_path / "on", *few, f"start_from={start}", "start_share=0.5") == 0
    card = (tmp_path / "on" / "export" / "README.md").read_text()
    assert f"trained on from `train` (`{start}`)" in card and "its matrices times 0.5 plus 0.5 of random ones" in card
    assert 'base_model: "train"' in card and f"| train (from `{start}`: next-token cross-entropy)" in card
    assert "scratch" not in card.split("## Reproduce")[0] and "random parameters" not in card


@pytest.mark.parametrize("position", POSITIONS)
def test_every_position_variant_of_a_network(position):
    sizes = NetworkConfig(**SIZES, attention_layers=(0,), position=position, qk_norm=position != "nope")
    config = network(sizes, byte_tokenizer())
    assert (config.attention_rope, config.lightning.rope) == POSITIONS[position]
    assert config.mixers == ("attention", "lightning") and config.eos_ids == (256,) and config.vocab_size == 257
    model = hn.LanguageModel(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert ("q_norm" in shapes["layer_1"]["mixer"]) == (position != "nope")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_layers": (2,)}, "attention layer 2 is outside"),
        ({"position": "nope"}, "model.position is 'nope' but model.attention_layers is not given"),
        ({"logits_scaling": 500.0}, "model.logits_scaling is 500 but model.attention_layers is not given"),
        ({"position": "alibi"}, "model.position is 'alibi'"),
        ({"num_kv_heads": 3}, "num_kv_heads 3"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"attention_layers": (0,), "logits_scaling": 0.5}, "value is 0.5"),
    ],
)
def test_networks_that_cannot_be(changes, words):
    with pytest.raises(HypenetError, match=words):
        network(NetworkConfig(**(SIZES | changes)), byte_tokenizer())


def test_a_refusal_comes_before_the_first_step(program, tmp_path, capsys):
    for setting, words in (
        ("evaluate.perplexity_length=5000", "needs a held-out document of 5001 tokens"),
        ("evaluate.lengths=[128]", "length 128 is too short"),
        ("model.num_heads=3", "num_heads is 3"),
        ("tokenizer=nowhere", "'nowhere' has no tokenizer.json"),
        ("dtype=bfloat16", "dtype is 'bfloat16'"),
    ):
        assert run(program, tmp_path / "run", setting) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "train").exists()
    # Nothing had begun, so that the mended config may have the directory.
    assert load_config(program).train.steps == 6
    assert run(program, tmp_path / "run", "train.steps=2", "evaluate.tasks=[]", "evaluate.prompts=[]") == 0


def test_a_model_to_start_from_is_looked_at_first(program, tmp_path, byte_teacher, capsys):
    for start, words in (
        ("nowhere", "there is no model at nowhere"),
        (byte_teacher, "is another network than `model`"),
    ):
        assert run(program, tmp_path / "run", f"start_from={start}") == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_the_other_kind_of_config(program, convert_config, tmp_path, capsys):
    assert main(["convert", "--config", str(program), "--workdir", str(tmp_path / "a")]) == 2
    assert (
        "is a config for training from scratch; hypenet convert needs one for converting a teacher"
        in capsys.readouterr().err
    )
    assert main(["pretrain", "--config", str(convert_config), "--workdir", str(tmp_path / "b")]) == 2
    assert "is a config for converting a teacher" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
