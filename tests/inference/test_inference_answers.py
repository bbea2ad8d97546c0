"""Questions answered as the assistant: what is asked, which answers count, and that the file can be trained on."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import hypenet_jax as hn
from hypenet_jax.cli import main
from hypenet_jax.data.chat import Message, parse_question
from hypenet_jax.data.packing import PackedTokens, pack
from hypenet_jax.data.sources import read_documents
from hypenet_jax.data.tokenizers import byte_tokenizer
from hypenet_jax.errors import HypenetError
from hypenet_jax.inference import answers, prompt_seed
from hypenet_jax.inference.answers import Counts, answer

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TOKENIZER = dataclasses.replace(byte_tokenizer(), chat_template=TEMPLATE)
EOS = 256
# Hot enough that the random model ends most of its turns.
HOT = {"temperature": 5.0, "max_new_tokens": 256, "seed": 3}


def silent(_):
    pass


@pytest.fixture(scope="module")
def teacher(byte_teacher, tmp_path_factory):
    """The byte teacher with a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "teacher"
    model, params = hn.load(byte_teacher)
    hn.save(dataclasses.replace(model, tokenizer=TOKENIZER), params, directory)
    return directory


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("What is 1?\n\n  And then, after that?  \r\nWho?\nWhy is it so?\nÉté?\n")
    return file


@pytest.fixture
def scripted(monkeypatch):
    """A function that lets `generate` give answers by the user's last words, and notes what was asked."""

    def script(said):
        asked = []

        def generate(model, params, prompts, **_):
            asked.extend(bytes(t if t < EOS else ord("|") for t in prompt).decode() for prompt in prompts)
            words = [bytes(t for t in prompt if t < EOS).decode() for prompt in prompts]
            return [next(ids for question, ids in said.items() if question in text) for text in words]

        monkeypatch.setattr(answers, "generate", generate)
        return asked

    return script


def rows(file):
    return [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def test_what_a_model_ended_is_written_in_order(teacher, questions, tmp_path, scripted):
    scripted({
        "1?": [*" Été!\n".encode()],
        "after": [65] * 9,
        "Who?": [32, 10],
        "Why": [66, EOS, 67],
        "Été": [*b"<eos>"],
    })  # fmt: skip
    counts = answer(teacher, questions, tmp_path / "out.jsonl", max_new_tokens=9, say=silent)
    assert counts == Counts(9, answered=1, unended=1, empty=1, unpackable=2)
    said = [{"role": "user", "content": "What is 1?"}, {"role": "assistant", "content": "Été!"}]
    assert rows(tmp_path / "out.jsonl") == [said] and "Été" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert str(counts) == (
        "1 of 5 questions answered; left out: 1 not ended within 9 tokens, 1 empty, "
        "2 not to be packed (a special token inside, mostly)"
    )
    assert str(Counts(8, answered=1200)) == "1,200 of 1,200 questions answered"


def test_conversations_are_answered_anew(teacher, tmp_path, scripted):
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?"), ("assistant", "No.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    file = tmp_path / "questions.jsonl"
    file.write_text(f"{json.dumps({'messages': messages, 'id': 7})}\n\n{json.dumps({'messages': messages[1:2]})}\n")
    asked = scripted({"Why?": [*b"Because"], "Hi": [*b"Hello you"]})
    answer(teacher, file, tmp_path / "out.jsonl", say=silent)
    assert asked == [
        "system: Be kind.|user: Hi|assistant: Hello|user: Why?|assistant: ",
        "user: Hi|assistant: ",
    ]
    assert rows(tmp_path / "out.jsonl") == [
        [*messages[:4], {"role": "assistant", "content": "Because"}],
        [messages[1], {"role": "assistant", "content": "Hello you"}],
    ]


def test_what_is_to_be_answered():
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant", "system")]
    found = parse_question({"messages": messages}, "line 1")
    assert found == tuple(Message(role, role) for role in ("user", "assistant", "user", "system"))


def test_the_file_is_packed_with_the_answers_marked(teacher, questions, tmp_path):
    counts = answer(teacher, questions, tmp_path / "out.jsonl", say=silent, **HOT)
    written = rows(tmp_path / "out.jsonl")
    assert 1 <= counts.answered == len(written) and counts.asked == 5
    documents = list(read_documents(tmp_path / "out.jsonl"))
    assert [[m._asdict() for m in document.conversation.messages] for document in documents] == written
    info = pack(documents, TOKENIZER, tmp_path / "packed", seed=0)
    packed = PackedTokens(tmp_path / "packed", TOKENIZER)
    tokens, _, prompts = (array[0] for array in packed.rows_with_prompts(np.array([0]), len(packed)))
    learned = TOKENIZER.decode(tokens[~prompts].tolist(), special_tokens=True).split("<eos>")[:-1]
    assert sorted(learned) == sorted(messages[-1]["content"] for messages in written)
    assert info.documents == counts.answered


def test_slices_draw_as_one_call(teacher, questions, tmp_path, monkeypatch):
    lines, called, generate = [], [], answers.generate
    monkeypatch.setattr(answers, "generate", lambda *a, **k: called.append(a[2]) or generate(*a, **k))
    whole = answer(teacher, questions, tmp_path / "whole.jsonl", batch_size=2, say=lines.append, **HOT)
    assert lines == [] and list(map(len, called)) == [0, 5]
    monkeypatch.setattr(answers, "SLICE", 1)
    sliced = answer(teacher, questions, tmp_path / "sliced.jsonl", batch_size=2, say=lines.append, **HOT)
    assert list(map(len, called)) == [0, 5, 0, 2, 2, 1]
    assert sliced == whole and (tmp_path / "sliced.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [line.partition(" questions asked, ")[0] for line in lines] == ["2 of 5", "4 of 5"]
    # The seed of a question is that of its place.
    model, params = hn.load(teacher)
    prompt = TOKENIZER.encode("user: What is 1?<eos>assistant: ", special_tokens=True)
    options = {name: value for name, value in HOT.items() if name != "seed"}
    (ids,) = hn.generate(model, params, [prompt], seeds=[prompt_seed(HOT["seed"], 0)], **options)
    first = {row[0]["content"]: row[1]["content"] for row in rows(tmp_path / "whole.jsonl")}.get("What is 1?")
    assert first == (TOKENIZER.decode(ids).strip() if len(ids) < HOT["max_new_tokens"] else None)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("moment", ["generate", "os.replace"])
def test_an_end_on_the_way_leaves_nothing(teacher, questions, tmp_path, scripted, monkeypatch, error, moment):
    def end(_model, _params, prompts=(), **_):
        if moment == "generate" and not prompts:
            return []
        raise error

    scripted({"": [65]})
    monkeypatch.setattr(f"hypenet_jax.inference.answers.{moment}", end)
    with pytest.raises(type(error)):
        answer(teacher, questions, tmp_path / "out.jsonl", say=silent)
    assert list(tmp_path.iterdir()) == [questions]


def test_no_answer_is_no_file(teacher, questions, tmp_path, scripted):
    scripted({"": [65] * 4})
    with pytest.raises(
        HypenetError, match=r"answered no question of .* \(5 not ended within 4 tokens\); raise max_new_tokens"
    ):
        answer(teacher, questions, tmp_path / "out.jsonl", max_new_tokens=4, say=silent)
    assert list(tmp_path.iterdir()) == [questions]


def test_a_name_that_is_taken_meanwhile(teacher, questions, tmp_path, scripted, monkeypatch):
    asked = scripted({"": [65]})
    load = answers.hub.load
    monkeypatch.setattr(answers.hub, "load", lambda path: (tmp_path / "out.jsonl").write_text("mine") and load(path))
    with pytest.raises(HypenetError, match="it exists"):
        answer(teacher, questions, tmp_path / "out.jsonl", say=silent)
    assert asked and (tmp_path / "out.jsonl").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", questions.name]


QUESTIONS = {
    "q.md": ("a", r"q\.md are of no known kind; use \.txt \(one a line\) or \.jsonl"),
    "no.txt": (None, r"there is no file of questions at .*no\.txt; give"),
    "q.txt": (" \n\n", r"q\.txt holds no question; write one a line"),
    "nothing.jsonl": ("", r"nothing\.jsonl holds no question"),
    "spelt.txt": ("Hi\nWhat is <eos>?", "message 1 of line 2 of .* spells the special token '<eos>'"),
    "broken.jsonl": ('{"messages": [', "line 1 of .* is broken json"),
    "text.jsonl": ('\n{"text": "Hi"}', "line 2 of .* has no 'messages'"),
    "list.jsonl": ("[]", "line 1 of .* has no 'messages'"),
    "empty.jsonl": ('{"messages": []}', "line 1 of .* holds an empty conversation"),
    "system.jsonl": (
        '{"messages": [{"role": "system", "content": "Hi"}]}',
        "line 1 of .* holds a conversation in which the user asks nothing",
    ),
    "silent.jsonl": ('{"messages": [{"role": "user", "content": " "}]}', "the user asks nothing; mend or remove it"),
    "role.jsonl": ('{"messages": [{"role": "tool", "content": "Hi"}]}', "message 1 of line 1 of .* has the role"),
    "tools.jsonl": ('{"messages": [{"role": "user", "content": "Hi"}], "tools": [1]}', "has the field 'tools'"),
}  # fmt: skip


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_that_are_refused(teacher, tmp_path, name, monkeypatch):
    contents, words = QUESTIONS[name]
    if contents is not None:
        (tmp_path / name).write_text(contents)
    monkeypatch.setattr(answers.hub, "load", None)
    with pytest.raises(HypenetError, match=words):
        answer(teacher, tmp_path / name, tmp_path / "out.jsonl", say=silent)
    assert not (tmp_path / "out.jsonl").exists()


def test_places_that_are_refused_before_anything_is_read(tmp_path):
    (tmp_path / "there.jsonl").write_text("mine")
    for out, words in (
        ("out.json", r"cannot write .*out\.json: conversations are kept as \.jsonl"),
        ("there.jsonl", r"cannot write .*there\.jsonl: it exists, or its directory does not; name a new file"),
        ("no/out.jsonl", "it exists, or its directory does not"),
    ):
        with pytest.raises(HypenetError, match=words):
            answer("nowhere", "nothing.txt", tmp_path / out)
    assert (tmp_path / "there.jsonl").read_text() == "mine"


def test_models_and_settings_that_are_refused(teacher, byte_teacher, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(answers.hub, "load", None)
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in byte_teacher.iterdir():
        if not file.name.startswith("tokenizer") and file.is_file():
            (bare / file.name).write_bytes(file.read_bytes())
    for model, options, words in (
        (tmp_path / "nowhere", {}, "there is no model at"),
        (bare, {}, r"bare has no tokenizer\.json; put one beside the weights"),
        (byte_teacher, {}, "the tokenizer of .* has no chat template; give an instruct model, or put one into"),
        (teacher, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (teacher, {"batch_size": 0}, "batch_size is 0"),
        (teacher, {"temperature": -1.0}, "temperature is -1"),
        (teacher, {"top_k": 0}, "top_k is 0"),
        (teacher, {"top_p": 1.5}, "top_p is 1.5"),
        (teacher, {"seed": -1}, "seed is -1"),
    ):
        with pytest.raises(HypenetError, match=words):
            answer(model, questions, tmp_path / "out.jsonl", say=silent, **options)


def test_what_could_not_be_packed_is_refused_before_it_is_answered(byte_teacher, questions, tmp_path, monkeypatch):
    loud = TEMPLATE.replace("m.content", "(m.content | upper)")
    model, params = hn.load(byte_teacher)
    hn.save(
        dataclasses.replace(model, tokenizer=dataclasses.replace(TOKENIZER, chat_template=loud)), params, tmp_path / "m"
    )
    monkeypatch.setattr(answers.hub, "load", None)
    with pytest.raises(HypenetError, match="the chat template does not write what the assistant says in message 2 of"):
        answer(tmp_path / "m", questions, tmp_path / "out.jsonl", say=silent)


def test_the_command_line(teacher, questions, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    flags = ["--temperature", "5", "--max-new-tokens", "256", "--seed", "3", "--top-k", "257", "--batch-size", "2"]
    argv = ["answer", str(teacher), str(questions), str(out), *flags]
    assert main(argv) == 0
    counts = answer(teacher, questions, tmp_path / "again.jsonl", batch_size=2, say=silent, **HOT)
    assert capsys.readouterr().out == f"{out}: {counts}\n"
    assert out.read_bytes() == (tmp_path / "again.jsonl").read_bytes()
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.err == f"hypenet: cannot write {out}: it exists, or its directory does not; name a new file\n"
    assert not said.out
