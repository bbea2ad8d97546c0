"""Questions answered by a model as the assistant, written as conversations to train on.

An instruct teacher's manners are taught to its student this way where there is no chat data: the file is a source of
conversations, for stage 3 with finetune_loss="completions".
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from hypenet_jax import hub
from hypenet_jax.data.chat import Conversation, Message, encode_conversation, encode_messages, parse_question
from hypenet_jax.data.sources import read_rows, read_text
from hypenet_jax.errors import HypenetError
from hypenet_jax.inference.generate import generate, serving_parameters
from hypenet_jax.inference.sampling import prompt_seed
from hypenet_jax.model import LanguageModel

if TYPE_CHECKING:
    from hypenet_jax.data.tokenizers import Tokenizer

# Batches between two lines of progress: `generate` puts similar lengths together among so many.
SLICE = 16


def answer(
    source: str | os.PathLike[str],
    questions: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    say: Callable[[str], None] = print,
) -> Counts:
    """Write the .jsonl `out`: a line {"messages": [{"role", "content"}, ..]} a question, in the order of the questions.

    source: what `hub.load` reads. questions: a .txt, one a line, or a .jsonl of {"messages": [..]}, whose assistant is
    answered anew after the user's last turn. Answers that did not end within max_new_tokens, empty ones and those that
    could not be packed (they spell a special token) are left out. Sampling as in `generate`, the seed of a question
    being prompt_seed(seed, index). `out` appears at the end.
    Raises HypenetError, before any weight is read, for an `out` that exists or cannot be, broken questions, settings
    out of range and a model without a chat template; and where no answer is left.
    """
    questions, out = pathlib.Path(questions), pathlib.Path(out)
    _check_out(out)
    asked = list(_questions(questions))
    if not asked:
        raise HypenetError(f"{questions} holds no question; write one a line")
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "batch_size": batch_size,
    }
    tokenizer = _chat_tokenizer(source, options | {"seed": seed})
    prompts = [_prompt(tokenizer, question) for question in asked]
    seeds = [prompt_seed(seed, index) for index in range(len(asked))]
    model, params = hub.load(source)
    params = serving_parameters(model, params)
    fates: list[str] = []
    lines: list[str] = []
    for start in range(0, len(asked), SLICE * batch_size):
        if start:
            say(f"{start:,} of {len(asked):,} questions asked, {len(lines):,} answered")
        part = slice(start, start + SLICE * batch_size)
        found = generate(model, params, prompts[part], seeds=seeds[part], **options)
        for question, ids in zip(asked[part], found, strict=True):
            fate, line = _answered(tokenizer, question, ids, max_new_tokens)
            fates.append(fate)
            lines += line
    counts = Counts(max_new_tokens, **collections.Counter(fates))
    if not lines:
        raise HypenetError(
            f"{source} answered no question of {questions} ({counts.left_out}); raise max_new_tokens or give an "
            "instruct model"
        )
    _write(out, "".join(lines))
    return counts


def _check_out(out: pathlib.Path) -> None:
    if out.suffix != ".jsonl":
        raise HypenetError(f"cannot write {out}: conversations are kept as .jsonl; name a file that ends so")
    if out.exists() or not out.parent.is_dir():
        raise HypenetError(f"cannot write {out}: it exists, or its directory does not; name a new file")
    if not os.access(out.parent, os.W_OK):
        raise HypenetError(f"cannot write {out}: its directory may not be written to; choose another place")


def _questions(file: pathlib.Path) -> Iterator[_Question]:
    if file.suffix not in (".txt", ".jsonl"):
        raise HypenetError(f"the questions {file} are of no known kind; use .txt (one a line) or .jsonl")
    if not file.is_file():
        raise HypenetError(f"there is no file of questions at {file}; give a .txt or a .jsonl")
    if file.suffix == ".txt":
        for number, line in enumerate(read_text(file).split("\n"), 1):
            if line.strip():
                yield _Question((Message("user", line.strip()),), f"line {number} of source file {str(file)!r}")
        return
    for row, where in read_rows(file):
        if not isinstance(row, dict) or "messages" not in row:
            raise HypenetError(f"{where} has no 'messages'; mend or remove it, or give plain questions as a .txt")
        yield _Question(parse_question(row, where), where)


def _chat_tokenizer(source: str | os.PathLike[str], options: dict[str, Any]) -> Tokenizer:
    """The model's tokenizer; HypenetError where it has no chat template, or where `generate` refuses the options."""
    config, tokenizer = hub.check(source)
    # Without a prompt it looks at the options alone.
    generate(LanguageModel(config), {}, [], **options)
    if tokenizer is None:
        raise HypenetError(f"{source} has no tokenizer.json; put one beside the weights")
    if tokenizer.chat_template is None:
        raise HypenetError(
            f"the tokenizer of {source} has no chat template; give an instruct model, or put one into "
            "tokenizer_config.json as chat_template"
        )
    return tokenizer


def _prompt(tokenizer: Tokenizer, question: _Question) -> list[int]:
    ids = encode_messages(tokenizer, question.messages, question.where)
    # With any answer: what cannot be packed is refused before hours of answering.
    encode_conversation(tokenizer, question.answered("Yes."))
    return ids


def _answered(tokenizer: Tokenizer, question: _Question, ids: list[int], max_new_tokens: int) -> tuple[str, list[str]]:
    """(the field of `Counts` that the answer belongs to, its line or none where it is left out)."""
    if len(ids) >= max_new_tokens:
        return "unended", []
    # Special tokens are written out, and then refused: without them, what surrounds them would read as an answer.
    text = tokenizer.decode(ids, special_tokens=True).strip()
    if not text:
        return "empty", []
    conversation = question.answered(text)
    try:
        encode_conversation(tokenizer, conversation)
    except HypenetError:
        return "unpackable", []
    messages = [message._asdict() for message in conversation.messages]
    return "answered", [json.dumps({"messages": messages}, ensure_ascii=False) + "\n"]


def _write(out: pathlib.Path, text: str) -> None:
    aside = out.with_name(f".answers.{os.getpid()}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        # Hours later: the name may be another's by now.
        _check_out(out)
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


class Counts(NamedTuple):
    """What became of the questions; as a text, a line for the user."""

    max_new_tokens: int
    answered: int = 0
    unended: int = 0
    empty: int = 0
    unpackable: int = 0

    @property
    def asked(self) -> int:
        return self.answered + self.unended + self.empty + self.unpackable

    @property
    def left_out(self) -> str:
        """How many were left out and why; empty where none was."""
        reasons = (
            (self.unended, f"not ended within {self.max_new_tokens:,} tokens"),
            (self.empty, "empty"),
            (self.unpackable, "not to be packed (a special token inside, mostly)"),
        )
        return ", ".join(f"{count:,} {reason}" for count, reason in reasons if count)

    def __str__(self) -> str:
        answered = f"{self.answered:,} of {self.asked:,} questions answered"
        return f"{answered}; left out: {self.left_out}" if self.left_out else answered


class _Question(NamedTuple):
    messages: tuple[Message, ...]
    where: str

    def answered(self, text: str) -> Conversation:
        return Conversation((*self.messages, Message("assistant", text)), self.where)
