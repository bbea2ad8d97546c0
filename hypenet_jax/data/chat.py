"""Conversations as text and as tokens: the model's own chat template, and which tokens are the assistant's.

The template is Hugging Face's (Jinja, `chat_template` of tokenizer_config.json). What the assistant says is found by
rendering the conversation up to each of its turns with the generation prompt: that is what the model is given when it
speaks, so its turn is what follows. The text is cut there and the pieces are tokenized one by one, so no token lies
across the border, as none does when the model writes the turn itself.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from hypenet_jax.errors import HypenetError

if TYPE_CHECKING:
    import jinja2

    from hypenet_jax.data.tokenizers import Tokenizer

ROLES = ("system", "user", "assistant")
# Fields of a row beside its messages that would change what is written, and are not read. Others (id, source) say
# something about it.
_SYSTEM_FIELDS = ("system", "system_prompt")
_TEMPLATE_FIELDS = (
    "tools", "functions", "tool_choice", "function_call", "parallel_tool_calls", "documents", "chat_template",
    "chat_template_kwargs", "enable_thinking",
)  # fmt: skip
# Templates drop the reasoning of earlier turns (Qwen3); what follows it stays.
_END_OF_REASONING = "</think>"


class Message(NamedTuple):
    """One turn; role is one of ROLES."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The turns of a conversation; `where` names the line it came from."""

    messages: tuple[Message, ...]
    where: str

    @property
    def text(self) -> str:
        """What was said, without the system's words, which many conversations share."""
        return "\n".join(message.content for message in self.messages if message.role != "system")


def parse_row(row: Mapping[str, Any], where: str) -> Conversation:
    """The row's "messages" as a Conversation, see `parse_messages`; fields that say something about it are left out.

    Raises HypenetError, naming `where` and the field, for a field that would change what is written (tools, a system
    prompt beside the messages), unless it is null or empty.
    """
    _check_fields(row, where)
    return parse_messages(row["messages"], where)


def parse_question(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """The row's "messages" without what the assistant says after the user's last turn: what is to be answered.

    Raises HypenetError as `parse_row` does, but an answer is not asked for: the user's last turn is.
    """
    _check_fields(row, where)
    messages = _messages(row["messages"], where)
    last = max((place for place, message in enumerate(messages) if message.role == "user"), default=None)
    if last is None or not messages[last].content.strip():
        raise HypenetError(f"{where} holds a conversation in which the user asks nothing; mend or remove it")
    return messages[:last] + tuple(message for message in messages[last:] if message.role != "assistant")


def parse_messages(value: Any, where: str) -> Conversation:
    """[{"role", "content"}, ..] as a Conversation; further keys must be null.

    Raises HypenetError, naming `where` and the message, for an empty conversation or one in which the assistant says
    nothing, unknown roles and keys, and content that is no text.
    """
    messages = _messages(value, where)
    if not any(message.role == "assistant" and message.content.strip() for message in messages):
        raise HypenetError(f"{where} holds a conversation in which the assistant says nothing; mend or remove it")
    return Conversation(messages, where)


def render(tokenizer: Tokenizer, messages: tuple[Message, ...], where: str, *, generation_prompt: bool = False) -> str:
    """The messages as the tokenizer's chat template writes them; `generation_prompt` opens the assistant's next turn.

    Raises HypenetError, naming `where`, for a tokenizer without a template and for whatever the template objects to.
    """
    if tokenizer.chat_template is None:
        raise HypenetError(
            f"{where} is a conversation but the tokenizer has no chat template; "
            "put one into tokenizer_config.json as chat_template"
        )
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    # A template is a program of the model's makers: whatever it raises speaks of the conversation or of itself.
    try:
        return _compiled(tokenizer.chat_template).render(
            messages=[message._asdict() for message in messages],
            add_generation_prompt=generation_prompt,
            tools=None,
            **{name: tokenizer.token(token_id) for name, token_id in names.items() if token_id is not None},
        )
    except Exception as error:
        raise HypenetError(f"the chat template does not take {where} ({error}); mend either of them") from error


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a conversation that consists of one user turn, with the assistant's turn opened."""
    return encode_messages(tokenizer, (Message("user", text),), f"the prompt {text[:40]!r}")


def encode_messages(tokenizer: Tokenizer, messages: tuple[Message, ...], where: str) -> list[int]:
    """Ids of the messages with the assistant's turn opened: what the model is given when it answers.

    Raises HypenetError for a message that spells a special token, and as `render` does.
    """
    _check_special(tokenizer, messages, where)
    return tokenizer.encode(render(tokenizer, messages, where, generation_prompt=True), special_tokens=True)


def encode_conversation(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """(ids of the rendered conversation, True for each that the assistant wrote), ended by the end-of-document id.

    The assistant writes everything between the generation prompt and the end of its turn (Qwen3's empty reasoning
    included), and the turn's end: the first special token, or, where the template ends turns without one, the
    end-of-document id. Messages after the assistant's last one are left out, and so are spaces after it.
    Raises HypenetError for a conversation that spells a special token, a template that writes earlier turns in another
    way once later ones follow or that does not write what the assistant said, and as `render` does.
    """
    messages, where = conversation.messages, conversation.where
    spoken = [place for place, message in enumerate(messages) if message.role == "assistant"]
    messages = messages[: spoken[-1] + 1]
    _check_special(tokenizer, messages, where)
    _check_cuttable(tokenizer, where)
    whole = render(tokenizer, messages, where)
    starts = []
    for place in spoken:
        before = render(tokenizer, messages[:place], where, generation_prompt=True)
        if not whole.startswith(before):
            raise HypenetError(
                f"the chat template writes what precedes message {place + 1} of {where} in another way once it is "
                "there; use a template that only adds text, or one turn a conversation"
            )
        starts.append(len(before))
    ids = tokenizer.encode(whole[: starts[0]], special_tokens=True)
    written = [False] * len(ids)
    ended = False
    for place, start, stop in zip(spoken, starts, [*starts[1:], len(whole)], strict=True):
        turn, rest, ended = _cut_turn(tokenizer, whole[start:stop], messages[place].content, f"{place + 1} of {where}")
        turn_ids = tokenizer.encode(turn, special_tokens=True)
        rest = "" if stop == len(whole) and not rest.strip() else rest
        rest_ids = tokenizer.encode(rest, special_tokens=True)
        ids += turn_ids + rest_ids
        written += [True] * len(turn_ids) + [False] * len(rest_ids)
    if not ended or ids[-1] != tokenizer.eos_id:
        ids.append(tokenizer.eos_id)
        written.append(not ended)
    return ids, written


def _check_fields(row: Mapping[str, Any], where: str) -> None:
    for name in (*_SYSTEM_FIELDS, *_TEMPLATE_FIELDS):
        value = row.get(name)
        if value is None or value == "" or value == [] or value == {}:
            continue
        if name in _SYSTEM_FIELDS:
            raise HypenetError(f"{where} has the field {name!r}; write it as the first message, with the role system")
        raise HypenetError(
            f"{where} has the field {name!r}, which would change how the conversation is written and is not read; "
            "remove it, or the line"
        )


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise HypenetError(f"{where} has 'messages' that are no list; mend or remove it")
    messages = tuple(_message(entry, f"message {number} of {where}") for number, entry in enumerate(value, 1))
    if not messages:
        raise HypenetError(f"{where} holds an empty conversation; give it messages or remove it")
    return messages


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, dict):
        raise HypenetError(f"{where} is no object; write {{'role': .., 'content': ..}}")
    role, content = entry.get("role"), entry.get("content")
    if role not in ROLES:
        raise HypenetError(f"{where} has the role {role!r}; use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise HypenetError(f"{where} has no string in the field 'content'; mend or remove it")
    further = [key for key, value in entry.items() if key not in Message._fields and value is not None]
    if further:
        raise HypenetError(f"{where} has the field {further[0]!r}, which is not read; remove it")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise HypenetError(f"{where} holds half a surrogate pair, which is no text; mend or remove it") from error
    return Message(role, content)


def _check_special(tokenizer: Tokenizer, messages: tuple[Message, ...], where: str) -> None:
    # The template's own special tokens are read from the rendered text, where such words would pass for them.
    for number, message in enumerate(messages, 1):
        for word in tokenizer.special_tokens:
            if word in message.content:
                raise HypenetError(f"message {number} of {where} spells the special token {word!r}; write it otherwise")


def _check_cuttable(tokenizer: Tokenizer, where: str) -> None:
    if _marks_beginnings(tokenizer.json):
        raise HypenetError(
            f"{where} is a conversation, but the tokenizer marks the beginning of every text (as sentencepiece does), "
            "which the turns are not; use a byte-level tokenizer"
        )


@functools.lru_cache(maxsize=2)
def _marks_beginnings(tokenizer_json: str) -> bool:
    contents = json.loads(tokenizer_json)
    parts = [contents.get("normalizer"), contents.get("pre_tokenizer")]
    while parts:
        part = parts.pop() or {}
        if part.get("type") in ("Metaspace", "Prepend") or part.get("add_prefix_space"):
            return True
        parts += part.get("normalizers", []) + part.get("pretokenizers", [])
    return False


def _cut_turn(tokenizer: Tokenizer, text: str, content: str, where: str) -> tuple[str, str, bool]:
    """(what the assistant wrote with the token that ends its turn, what follows, whether a token ends it)."""
    said = content.rpartition(_END_OF_REASONING)[2].strip()
    ends = [(text.index(word), len(word)) for word in tokenizer.special_tokens if word in text]
    if ends:
        # The longest of those that begin first, as the tokenizer takes it.
        place, length = min(ends, key=lambda end: (end[0], -end[1]))
        if text[:place].rstrip().endswith(said):
            return text[: place + length], text[place + length :], True
    else:
        place = text.find(said)
        if place >= 0 and not text[:place].strip():
            return text[: place + len(said)], text[place + len(said) :], False
    raise HypenetError(
        f"the chat template does not write what the assistant says in message {where} between the generation prompt "
        "and the end of the turn; use another template"
    )


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    # Imported here: plain text needs no Jinja.
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks the assistant's words in some templates; what is inside is written as it is."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    # As transformers sets it up; without its `strftime_now`, so that a text is the same on every day.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(template)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise HypenetError(message)
