"""Conversations in a conversion: what stage 3 learns from them, and prompts of the evaluation as user turns."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest

import hypenet_jax as hn
from hypenet_jax.cli import main
from hypenet_jax.config import load_config
from hypenet_jax.data.packing import PackedTokens, pack
from hypenet_jax.data.sources import read_documents
from hypenet_jax.data.tokenizers import byte_tokenizer, load_tokenizer
from hypenet_jax.errors import HypenetError
from hypenet_jax.evals import suite
from hypenet_jax.halo import corpus, pipeline, precheck
from hypenet_jax.halo.run import Run
from hypenet_jax.parallel.mesh import make_mesh

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TOKENIZER = dataclasses.replace(byte_tokenizer(), chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A .jsonl of 40 conversations and 10 plain texts."""
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = []
    for i in range(40):
        turns = [("user", f"{i}. What comes after {i}?"), ("assistant", str(i + 1)), ("user", "Sure?")]
        messages = [{"role": role, "content": text} for role, text in [*turns, ("assistant", "Yes, " * (i % 5 + 1))]]
        lines.append(json.dumps({"messages": messages}))
    file.write_text("\n".join([*lines, *(json.dumps({"text": f"text {i} " * 20}) for i in range(10))]))
    return file


@pytest.fixture(scope="module")
def packed(chats, tmp_path_factory):
    directory = tmp_path_factory.mktemp("packed") / "chats"
    pack(read_documents(chats), TOKENIZER, directory, seed=0)
    return PackedTokens(directory, TOKENIZER)


@pytest.fixture
def config(convert_config):
    return load_config(convert_config, ["finetune_loss='completions'"])


def test_only_stage_3_learns_completions(config, packed, tiny, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(corpus, "stage_start", lambda config, name: 0)
    monkeypatch.setattr(pipeline, "train", lambda *, name, batches, **_: (seen.setdefault(name, next(batches)), 0))
    model, params = tiny
    mesh = make_mesh(None, jax.devices()[:1])
    run = Run(config, tmp_path, mesh, model, params, packed, packed, None)
    for name in ("align", "distill", "finetune"):
        pipeline._train(run, name, None, model, params, model.param_axes(), None)
    # Three stages with the same rows: only the last leaves the prompts out.
    assert (seen["distill"]["loss_mask"] == seen["align"]["loss_mask"]).all()
    learned, targets = seen["finetune"]["loss_mask"], seen["finetune"]["targets"]
    said = bytes(targets[learned & (targets < 256)].tolist())
    assert b"Yes, " in said and b"What comes" not in said and b"user:" not in said
    assert 0 < learned.sum() < seen["distill"]["loss_mask"].sum()
    run = dataclasses.replace(run, config=dataclasses.replace(config, finetune_loss="all"))
    seen.clear()
    pipeline._train(run, "finetune", None, model, params, model.param_axes(), None)
    assert b"user:" in bytes(seen["finetune"]["targets"][seen["finetune"]["loss_mask"]].clip(0, 255).tolist())


def test_completions_need_conversations(config, documents_file, packed, tmp_path):
    pack(read_documents(documents_file), TOKENIZER, tmp_path / "p", seed=0)
    plain = PackedTokens(tmp_path / "p")
    with pytest.raises(HypenetError, match="finetune_loss is 'completions' but data.sources hold no conversation"):
        precheck.check_text(config, TOKENIZER, plain, plain)
    config = dataclasses.replace(config, select=dataclasses.replace(config.select, method="evenly"))
    precheck.check_text(config, TOKENIZER, packed, plain)
    # Conversations of stage 3's own do as well, and those of the other stages do not.
    config = dataclasses.replace(config, finetune_sources=("chats.jsonl",))
    precheck.check_text(config, TOKENIZER, plain, plain, packed)
    with pytest.raises(HypenetError, match="'completions' but finetune_sources hold no conversation"):
        precheck.check_text(config, TOKENIZER, packed, plain, plain)


def test_stage_3_needs_something_to_learn(config, documents_file, tmp_path):
    """All that its rows hold is one user's long question: the answer lies behind them."""
    pack(read_documents(documents_file), TOKENIZER, tmp_path / "plain", seed=0)
    messages = [{"role": "user", "content": "Why? " * 2000}, {"role": "assistant", "content": "Because."}]
    (tmp_path / "long.jsonl").write_text(json.dumps({"messages": messages}))
    pack(read_documents(tmp_path / "long.jsonl"), TOKENIZER, tmp_path / "p", seed=0)
    long, plain = PackedTokens(tmp_path / "p"), PackedTokens(tmp_path / "plain")
    config = dataclasses.replace(config, select=dataclasses.replace(config.select, method="evenly"))
    with pytest.raises(HypenetError, match="none of the 1,024 tokens that stage finetune reads .* by an assistant"):
        precheck.check_text(config, TOKENIZER, long, plain)
    everything = dataclasses.replace(config, finetune_loss="all")
    precheck.check_text(everything, TOKENIZER, long, plain)
    # Far enough, and over the end of the stream: 1,280 + 1,280 tokens come before, of about 10,000.
    far = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, steps=40))
    precheck.check_text(far, TOKENIZER, long, plain)


def test_unknown_losses_are_refused(convert_config):
    with pytest.raises(HypenetError, match="finetune_loss is 'answers'; use one of all, completions"):
        load_config(convert_config, ["finetune_loss='answers'"])


def test_prompts_as_user_turns(byte_teacher, packed, monkeypatch):
    asked = []
    monkeypatch.setattr(suite, "generate", lambda model, params, ids, new: asked.extend(ids) or [[65]] * len(ids))
    for chat in (False, True):
        found = suite.write_samples("m", None, {}, TOKENIZER, ["Hi"], 4, chat=chat)
        assert found == [{"model": "m", "prompt": "Hi", "text": "A"}]
    assert asked == [[*b"Hi"], [*b"user: Hi", 256, *b"assistant: "]]


def test_user_turns_need_a_template(config, documents_file, tmp_path):
    pack(read_documents(documents_file), TOKENIZER, tmp_path / "p", seed=0)
    settings = dataclasses.replace(config.evaluate, chat=True)
    precheck.check_evaluation(settings, TOKENIZER, PackedTokens(tmp_path / "p"), 0)
    with pytest.raises(HypenetError, match="'evaluate': the prompt 'One of the' .* has no chat template"):
        precheck.check_evaluation(settings, byte_tokenizer(), PackedTokens(tmp_path / "p"), 0)


def test_held_out_by_what_was_said(chats):
    """The words that all conversations share do not decide."""
    texts = [document.text for document in read_documents(chats)]
    assert texts[3].startswith("3. What comes after 3?\n4\nSure?")
    assert 0 < sum(corpus.is_heldout(text, 0.3) for text in texts) < len(texts)


def test_the_command_line(chats, byte_teacher, tmp_path, capsys):
    model, params = hn.load(byte_teacher)
    hn.save(dataclasses.replace(model, tokenizer=TOKENIZER), params, tmp_path / "model")
    assert load_tokenizer(tmp_path / "model") == TOKENIZER
    flags = ["--tokenizer", str(tmp_path / "model"), "--out", str(tmp_path / "packed")]
    assert main(["pack", str(chats), *flags]) == 0
    assert "of 50 documents" in capsys.readouterr().out
    assert main(["pack", str(chats), "--out", str(tmp_path / "bytes")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hypenet: line ") and "is a conversation but the tokenizer has no chat template" in said
    assert not (tmp_path / "bytes").exists()
