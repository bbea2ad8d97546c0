"""Conversations are written by the template, and exactly the assistant's tokens are marked as its own."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data_chat_tokenizer import (
    CHATML,
    END_THINK,
    EOS,
    IM_END,
    IM_START,
    PLAIN,
    REASONING,
    THINK,
    TWO_LINES,
    chat_tokenizer,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

from hypenet_jax.data.batches import StageBatches
from hypenet_jax.data.chat import Conversation, Message, encode_conversation, encode_prompt, parse_messages, render
from hypenet_jax.data.packing import PackedTokens, pack
from hypenet_jax.data.sources import Document, read_documents
from hypenet_jax.data.tokenizers import byte_tokenizer, load_tokenizer
from hypenet_jax.errors import HypenetError


def conversation(*turns):
    """Turns of user and assistant in alternation, or (role, content) pairs."""
    roles = ("user", "assistant")
    pairs = [turn if isinstance(turn, tuple) else (roles[i % 2], turn) for i, turn in enumerate(turns)]
    return Conversation(tuple(Message(*pair) for pair in pairs), "line 1 of chats")


def said(tokenizer, *turns):
    """The assistant's tokens as runs of text, and the ids of the whole."""
    ids, written = encode_conversation(tokenizer, conversation(*turns))
    assert len(ids) == len(written)
    runs, previous = [], False
    for token, is_written in zip(ids, written, strict=True):
        if is_written:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = is_written
    return [tokenizer.decode(run, special_tokens=True) for run in runs], ids


def test_chatml():
    tokenizer = chat_tokenizer()
    runs, ids = said(
        tokenizer, ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Ok")
    )
    assert runs == ["Hello!<|im_end|>", "Ok<|im_end|>"]
    text = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nOk<|im_end|>"
    )
    assert tokenizer.decode(ids, special_tokens=True) == text
    assert ids.count(IM_START) == ids.count(IM_END) == 5
    # As the tokenizer takes the whole text, where no token would reach across a border.
    assert ids == tokenizer.encode(text, special_tokens=True)


contents = st.text("ab \n<>é|", max_size=12)


@given(
    st.lists(st.tuples(contents, contents.filter(str.strip)), min_size=1, max_size=4),
    st.sampled_from([CHATML, REASONING]),
)
def test_the_prompt_is_what_generation_is_given(turns, template):
    """Every turn follows, token by token, the generation prompt of what precedes it."""
    tokenizer = chat_tokenizer(template)
    flat = [text for pair in turns for text in pair]
    ids, written = encode_conversation(tokenizer, conversation(*flat))
    runs, whole = said(tokenizer, *flat)
    assert len(runs) == len(turns) and whole == ids
    begins = [i for i in range(len(ids)) if written[i] and not written[i - 1]]
    for number, begin in enumerate(begins):
        before = conversation(*flat[: 2 * number + 1]).messages
        prompt = render(tokenizer, before, "here", generation_prompt=True)
        assert tokenizer.decode(ids[:begin], special_tokens=True) == prompt
        assert runs[number].endswith("<|im_end|>") and runs[number].count("<|im_end|>") == 1
    for number, (run, (_, answer)) in enumerate(zip(runs, turns, strict=True)):
        if template == CHATML:
            assert run == answer + "<|im_end|>"
        else:
            reasoning = "<think>\n\n</think>\n\n" if number == len(turns) - 1 else ""
            assert run == reasoning + answer.lstrip("\n") + "<|im_end|>"


def test_no_token_lies_across_the_border():
    tokenizer = chat_tokenizer()
    ids, written = encode_conversation(tokenizer, conversation("Hi", "\nHo"))
    assert tokenizer.encode("assistant\n\nHo")[9:11] == [TWO_LINES, ord("H")]
    place = written.index(True)
    assert ids[place - 1 : place + 2] == [10, 10, ord("H")]
    # Inside a turn the merge is there.
    assert TWO_LINES in encode_conversation(tokenizer, conversation("Hi", "a\n\nb"))[0]


def test_reasoning_of_the_last_turn_alone():
    tokenizer = chat_tokenizer(REASONING)
    turns = ("1+1?", "<think>\nEasy.\n</think>\n\n2", "2+2?", "<think>\nAgain.\n</think>\n\n4")
    runs, ids = said(tokenizer, *turns)
    assert runs == ["2<|im_end|>", "<think>\nAgain.\n</think>\n\n4<|im_end|>"]
    assert ids.count(THINK) == ids.count(END_THINK) == 1
    assert said(tokenizer, "1+1?", "2")[0] == ["<think>\n\n</think>\n\n2<|im_end|>"]


def test_turns_that_no_token_ends():
    tokenizer = chat_tokenizer(PLAIN, eos="<eos>")
    runs, ids = said(tokenizer, "Hi", " Ho ", "Bye", "Bye")
    assert runs == [" Ho", " Bye<eos>"]
    assert tokenizer.decode(ids, special_tokens=True) == "USER: Hi\nASSISTANT: Ho\nUSER: Bye\nASSISTANT: Bye<eos>"


def test_another_end_of_document_is_not_the_assistants():
    ids, written = encode_conversation(chat_tokenizer(eos="<eos>"), conversation("Hi", "Ho"))
    assert ids[-2:] == [IM_END, EOS] and written[-2:] == [True, False]


def test_what_follows_the_last_answer_is_left_out():
    assert said(chat_tokenizer(), "Hi", "Ho", "And?") == said(chat_tokenizer(), "Hi", "Ho")


def test_generation_tags_are_no_text():
    marked = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}<|im_end|>"
    marked += "{% endgeneration %}\n{% endfor %}"
    marked += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    assert said(chat_tokenizer(marked), "Hi", "Ho")[0] == ["Ho<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "turns", "words"),
    [
        (None, ["Hi", "Ho"], "line 1 of chats is a conversation but the tokenizer has no chat template"),
        ("{% for", ["Hi", "Ho"], "the chat template does not take line 1 of chats"),
        ("{{ raise_exception('users first') }}", ["Hi", "Ho"], "users first"),
        ("{{ messages[5].content + 'x' }}", ["Hi", "Ho"], "does not take"),
        (CHATML, ["Hi", "a<|im_end|>b"], "message 2 of line 1 of chats spells the special token '<|im_end|>'"),
        (CHATML, ["<|im_start|>", "b"], "message 1 of line 1 of chats spells"),
        # Earlier turns change with the later ones; two answers in a row under reasoning.
        ("{{ messages | length }}" + CHATML, ["Hi", "Ho"], "in another way once it is there"),
        (REASONING, ["Hi", ("assistant", "a"), ("assistant", "b")], "message 3 of line 1 of chats in another way"),
        # No generation prompt: the header would count as said.
        (CHATML.replace("add_generation_prompt", "false"), ["Hi", "Ho"], "does not write what the assistant says"),
        (CHATML.replace("m.content", "m.content | upper"), ["Hi", "Ho"], "does not write what the assistant says"),
        (PLAIN.replace("trim", "upper"), ["Hi", "Ho"], "does not write what the assistant says in message 2"),
    ],
)
def test_what_cannot_be_exact_is_refused(template, turns, words):
    with pytest.raises(HypenetError, match=words):
        encode_conversation(chat_tokenizer(template), conversation(*turns))


def test_tokenizers_that_mark_beginnings_are_refused():
    contents = json.loads(chat_tokenizer().json)
    contents["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Metaspace", "replacement": "_"}]}
    tokenizer = type(chat_tokenizer())(json=json.dumps(contents), eos_id=IM_END, pad_id=IM_END, chat_template=CHATML)
    with pytest.raises(HypenetError, match="marks the beginning of every text"):
        encode_conversation(tokenizer, conversation("Hi", "Ho"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("Hi", "no list"),
        ([], "^line 1 holds an empty conversation"),
        ([{"role": "user", "content": "Hi"}], "the assistant says nothing"),
        ([{"role": "assistant", "content": " "}], "the assistant says nothing"),
        (["Hi"], "^message 1 of line 1 is no object"),
        ([{"role": "human", "content": "Hi"}], "^message 1 of line 1 has the role 'human'; use one of system, user"),
        ([{"content": "Hi"}], "the role None"),
        ([{"role": "user", "content": "a"}, {"role": "tool", "content": "Hi"}], "^message 2 .* 'tool'"),
        ([{"role": "user", "content": [{"text": "Hi"}]}], "no string in the field 'content'"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "assistant", "content": "a", "tool_calls": [1]}], "the field 'tool_calls', which is not read"),
    ],
)
def test_broken_conversations(value, words):
    with pytest.raises(HypenetError, match=words):
        parse_messages(value, "line 1")
    good = [{"role": "assistant", "content": "a", "tool_calls": None}]
    assert parse_messages(good, "line 1").messages == (Message("assistant", "a"),)


def messages_line(*turns):
    return json.dumps({"messages": [m._asdict() for m in conversation(*turns).messages]})


def test_sources(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(messages_line(("system", "S"), ("user", "Hi"), ("assistant", "Ho")) + '\n{"text": "plain"}\n')
    first, second = read_documents(file)
    assert first.text == "Hi\nHo" and [m.content for m in first.conversation.messages] == ["S", "Hi", "Ho"]
    assert first.conversation.where == f"line 1 of source file {str(file)!r}"
    assert second == Document(str(file), "plain")
    file.write_text('{"text": "x"}\n{"text": "x", "messages": []}')
    with pytest.raises(HypenetError, match="^line 2 of .* has both"):
        list(read_documents(file))
    file.write_text('{"messages": []}')
    with pytest.raises(HypenetError, match="^line 1 of .* holds an empty conversation"):
        list(read_documents(file))


def mixed():
    yield Document("plain", "a text")
    for i in range(20):
        yield Document("chat", "", conversation(f"question {i}", f"answer {i}", "more", "no" * i + "."))
        yield Document("plain", f"text {i}")


def test_packed_masks_are_the_documents_own(tmp_path):
    tokenizer = chat_tokenizer()
    info = pack(mixed(), tokenizer, tmp_path / "p", seed=0, block=16, shard_tokens=160)
    packed = PackedTokens(tmp_path / "p", tokenizer)
    expected = {}
    for document in mixed():
        if document.conversation is None:
            ids = [*tokenizer.encode(document.text), IM_END]
            expected[tuple(ids)] = [False] * len(ids)
        else:
            ids, written = encode_conversation(tokenizer, document.conversation)
            expected[tuple(ids)] = [not w for w in written]
    tokens, starts, prompts = (array[0] for array in packed.rows_with_prompts(np.array([0]), len(packed)))
    np.testing.assert_array_equal(tokens, packed.slice(0, len(packed))[0])
    cuts = [*np.flatnonzero(starts), len(packed)]
    found = {tuple(tokens[a:b].tolist()): prompts[a:b].tolist() for a, b in zip(cuts, cuts[1:], strict=False)}
    assert found == expected and info.documents == len(expected) == 41
    assert info.tokens == sum(map(len, expected)) == info.sources["chat"]["tokens"] + info.sources["plain"]["tokens"]


@given(st.integers(0, 3))
def test_batches_count_completions_and_whole_texts(tmp_path_factory, seed):
    directory = tmp_path_factory.getbasetemp() / "completions"
    pack(mixed(), chat_tokenizer(), directory, seed=0, sources=["mixed"])
    packed = PackedTokens(directory)
    options = {"seq_len": 32, "batch_size": 4, "start_token": 5, "steps": 6, "seed": seed}
    every, some = StageBatches(packed, **options), StageBatches(packed, completions=True, **options)
    for whole, part in zip(every, some, strict=True):
        for name in ("tokens", "targets", "segment_ids"):
            np.testing.assert_array_equal(whole[name], part[name])
        assert not (part["loss_mask"] & ~whole["loss_mask"]).any()
        # A role's name is never learned, the end of a turn after letters of an answer is.
        assert not part["loss_mask"][part["targets"] == IM_START].any()
        assert 0 < part["loss_mask"].sum() < whole["loss_mask"].sum()
    _, starts, prompts = packed.rows_with_prompts(np.array([0]), len(packed))
    assert (~prompts).sum() > starts.sum()
    with pytest.raises(HypenetError, match="completions"):
        some.set_state(every.get_state())
    with pytest.raises(HypenetError, match="completions"):
        every.set_state(some.get_state())


def test_plain_packs_are_as_they_were(tmp_path):
    """Nothing about conversations is written, so a pack of an earlier version is such a pack."""
    texts = [Document("s", "one"), Document("s", "two")]
    pack(texts, chat_tokenizer(), tmp_path / "p", seed=0, sources=["s"])
    meta = json.loads((tmp_path / "p" / "meta.json").read_text())
    assert set(meta) == {"tokens", "documents", "sha256", "shards", "sources", "request"}
    assert meta["request"]["format"] == 1
    packed = PackedTokens(tmp_path / "p", chat_tokenizer(None))
    assert not packed.rows_with_prompts(np.array([0]), 8)[2].any()
    pack(iter(()), chat_tokenizer(PLAIN), tmp_path / "p", seed=0, sources=["s"])


def test_chat_packs_belong_to_a_template(tmp_path):
    def packs(template):
        pack(mixed(), chat_tokenizer(template), tmp_path / "p", seed=0, sources=["s"])

    packs(CHATML)
    meta = json.loads((tmp_path / "p" / "meta.json").read_text())
    assert meta["request"]["format"] == 2 and meta["chat_template"] == chat_tokenizer().chat_fingerprint
    packs(CHATML)
    for other in (REASONING, None):
        with pytest.raises(HypenetError, match="was packed with the chat template"):
            packs(other)
    meta["request"]["format"] = 3
    (tmp_path / "p" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(HypenetError, match="has format 3, not 1 or 2"):
        PackedTokens(tmp_path / "p")


def test_tokenizer_files_carry_the_template(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.save(tmp_path / "t")
    assert load_tokenizer(tmp_path / "t") == tokenizer
    config = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    listed = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": listed}))
    assert load_tokenizer(tmp_path / "t").chat_template == "y"
    (tmp_path / "t" / "chat_template.jinja").write_text("z")
    assert load_tokenizer(tmp_path / "t").chat_template == "z"
    (tmp_path / "t" / "chat_template.jinja").unlink()
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": 5}))
    with pytest.raises(HypenetError, match="is no text"):
        load_tokenizer(tmp_path / "t")
    byte_tokenizer().save(tmp_path / "b")
    assert "chat_template" not in json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())


def test_prompts_of_the_evaluation():
    tokenizer = chat_tokenizer()
    ids = encode_prompt(tokenizer, "Hi")
    assert tokenizer.decode(ids, special_tokens=True) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(HypenetError, match="the prompt 'Hi' is a conversation but the tokenizer has no chat template"):
        encode_prompt(chat_tokenizer(None), "Hi")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("tools", [{"type": "function"}], "the field 'tools', which would change how the conversation is written"),
        ("functions", [{"name": "f"}], "the field 'functions'"),
        ("documents", [{"text": "d"}], "the field 'documents'"),
        ("enable_thinking", False, "the field 'enable_thinking'"),
        ("chat_template", "{{ messages }}", "the field 'chat_template'"),
        ("chat_template_kwargs", {"a": 1}, "the field 'chat_template_kwargs'"),
        ("system", "Be brief.", "the field 'system'; write it as the first message, with the role system"),
        ("system_prompt", "Be brief.", "the field 'system_prompt'; write it as the first message"),
    ],
)
def test_fields_of_a_row_that_change_the_text_are_refused(tmp_path, field, value, words):
    """What is dropped in silence would be trained on as if it had never been there."""
    file = tmp_path / "rows.jsonl"
    row = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "id": 7,
        "source": "s",
    }
    empty = {
        field: type(value)() if isinstance(value, (list, dict, str)) else None,
        "prompt": "q",
        "meta": {"tools": 1},
    }
    file.write_text("\n".join(json.dumps(row | more) for more in ({}, empty, {field: None})))
    assert [document.text for document in read_documents(file)] == ["q\na"] * 3
    file.write_text("\n".join(json.dumps(row | more) for more in ({}, {field: value})))
    with pytest.raises(HypenetError, match="line 2 of source file") as caught:
        list(read_documents(file))
    assert words in str(caught.value)
