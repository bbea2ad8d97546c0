"""Another stage 3 after the same stages 1 and 2: with a text of its own, in a copy of what came before."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

from hypenet_jax.cli import main
from hypenet_jax.data.packing import PackedTokens
from hypenet_jax.halo import pipeline
from hypenet_jax.halo.workdir import read_json

pytestmark = pytest.mark.usefixtures("on_one_device")


@pytest.fixture
def before_stage_3(finished, tmp_path):
    """A work directory in which stages 1 and 2 are done: the command that docs/quickstart.md gives copies the same."""
    copy = tmp_path / "other"
    copy.mkdir()
    for name in ("config.json", "run.json", "select.json"):
        shutil.copy(finished / name, copy)
    for name in ("data", "align", "distill"):
        shutil.copytree(finished / name, copy / name)
    return copy


def test_stage_3_reads_its_own_text_from_its_beginning(
    before_stage_3, convert_config, finished, tmp_path, monkeypatch, capsys
):
    source, read = tmp_path / "long.jsonl", []
    texts = [f"{i} little bears. " * 300 for i in range(6)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--config", str(convert_config), "--workdir", str(before_stage_3)]
    wanted = (f"finetune_sources=[{str(source)!r}]", "finetune.seq_len=128", "finetune.steps=2")
    sets = [word for setting in wanted for word in ("--set", setting)]
    batches = pipeline.corpus.stage_batches

    def recorded(packed, stage, start, *rest, **named):
        read.append((pathlib.Path(packed.directory).name, start))
        return batches(packed, stage, start, *rest, **named)

    monkeypatch.setattr(pipeline.corpus, "stage_batches", recorded)
    for step in ("finetune", "fit-scale", "export"):
        assert main([step, *words, *sets]) == 0
    own = PackedTokens(before_stage_3 / "data" / "finetune")
    assert set(read) == {("train", 0), ("finetune", 0)} and 6 > own.info.documents > 0
    assert own.info.documents == sum(not pipeline.corpus.is_heldout(text, 0.3) for text in texts)
    card = (before_stage_3 / "export" / "README.md").read_text()
    packed = read_json(finished / "data" / "train" / "meta.json")["tokens"]
    assert f"- sources of stage finetune: `{source}`\n" in card
    assert f"- trained on: 2,560 tokens (align 1,280, distill 1,280), {2560 / packed:.3g} times the text" in card
    assert f"- of stage finetune: {len(own):,} tokens of {own.info.documents} documents\n" in card
    assert f"- trained on: 1,024 tokens (finetune 1,024), {1024 / len(own):.3g} times the text" in card
    assert main(["finetune", *words]) == 2
    assert "belongs to another run: finetune.seq_len was 128 and is 64" in capsys.readouterr().err


def test_plain_text_of_its_own_holds_no_completions(before_stage_3, convert_config, documents_file, capsys):
    words = ["finetune", "--config", str(convert_config), "--workdir", str(before_stage_3)]
    sets = ["--set", "finetune_loss=completions", "--set", f"finetune_sources=[{str(documents_file)!r}]"]
    assert main([*words, *sets]) == 2
    assert "but finetune_sources hold no conversation to train on" in capsys.readouterr().err
