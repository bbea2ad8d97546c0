"""Text to token ids and back: one frozen wrapper around the `tokenizers` library, and a byte tokenizer.

Text never turns into a special id: a document that quotes "<eos>" is packed as the characters of "<eos>". The
library parses the strings of special tokens out of any text unless `encode_special_tokens` is set, so it is set here;
`encode(..., special_tokens=True)` is the exception for chat templates. Added tokens that are not marked special (such
as "<think>") are ordinary tokens of their model and are still recognised.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json as jsonlib
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import tokenizers

from hypenet_jax.errors import HypenetError

BYTE_EOS = "<eos>"
# What a bare tokenizer.json calls the end of a document, where no other file of the model says it.
_END_NAMES = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>")


def byte_tokenizer() -> Tokenizer:
    """Byte-level tokenizer: id = byte value 0..255 of the UTF-8 text, "<eos>" = 256, vocab_size 257.

    It is an ordinary tokenizer.json (BPE without merges, ByteLevel pre-tokenizer and decoder), so that an exported
    model of it loads anywhere.
    """
    # Written out here and not by the library, so that the fingerprint is the same under every version of it.
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": 256, "content": BYTE_EOS, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    contents: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**end, **flags}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }
    return Tokenizer(json=jsonlib.dumps(contents), eos_id=256, pad_id=256)


def load_tokenizer(path: str | os.PathLike[str], eos_ids: Sequence[int] | None = None) -> Tokenizer:
    """The tokenizer of a model directory, or of a tokenizer.json (the files beside it are read too).

    The special ids come from tokenizer_config.json, then generation_config.json, then config.json; `eos_ids` comes
    before all of them (its first id ends a document, each of them ends a generation). Padding defaults to the
    end-of-document id. Raises HypenetError for missing or broken files and where no end of document is named.
    """
    path = pathlib.Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise HypenetError(f"tokenizer {str(path)!r} has no tokenizer.json; give a model directory or that file")
    json = _read_text(file)
    _library(json, str(file))
    found = Tokenizer(json=json, eos_id=0, pad_id=0)
    named = _named_ids(file.parent, found)
    stop_ids = tuple(eos_ids) if eos_ids is not None else tuple(named["eos"]) or _guessed_end(found)
    if not stop_ids:
        raise HypenetError(f"tokenizer {str(path)!r} names no end-of-document token; pass eos_ids")
    for name, ids in (("eos", stop_ids), ("pad", named["pad"]), ("bos", named["bos"])):
        for token_id in ids:
            if found.token(token_id) is None:
                raise HypenetError(
                    f"tokenizer {str(path)!r} has no token {token_id}, which is named its {name} id; correct that id"
                )
    return Tokenizer(
        json=json,
        eos_id=stop_ids[0],
        pad_id=next(iter(named["pad"]), stop_ids[0]),
        bos_id=next(iter(named["bos"]), None),
        stop_ids=stop_ids,
        chat_template=_chat_template(file.parent),
    )


def _byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte (GPT-2's table): printable ones stand for themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _read_text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HypenetError(
            f"tokenizer file {str(file)!r} cannot be read as UTF-8 text ({error}); restore it"
        ) from error


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = jsonlib.loads(_read_text(file))
    except jsonlib.JSONDecodeError as error:
        raise HypenetError(f"{str(file)!r} is broken json ({error}); restore it") from error
    if not isinstance(found, dict):
        raise HypenetError(f"{str(file)!r} holds a {type(found).__name__} where an object belongs; restore it")
    return found


def _library(json: str, name: str) -> tokenizers.Tokenizer:
    # The library raises plain `Exception` for a broken file.
    try:
        library = tokenizers.Tokenizer.from_str(json)
    except Exception as error:
        raise HypenetError(f"{name!r} is no tokenizer.json ({error}); restore it") from error
    # A tokenizer.json may carry the truncation of its training run, which would silently drop text.
    library.no_truncation()
    library.no_padding()
    return library


def _named_ids(directory: pathlib.Path, found: Tokenizer) -> dict[str, list[int]]:
    """The ids that the model's files name as eos, pad and bos: tokenizer_config.json's first, then the others'."""
    names = ("tokenizer_config.json", "generation_config.json", "config.json")
    files = {name: _read_json(directory / name) for name in names}
    named: dict[str, list[int]] = {}
    for role in ("eos", "pad", "bos"):
        ids: list[int] = []
        token = files["tokenizer_config.json"].get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            token_id = found.token_id(token) if isinstance(token, str) else None
            if token_id is None:
                raise HypenetError(f"{role}_token {token!r} of tokenizer_config.json in {str(directory)!r} is no token")
            ids.append(token_id)
        for name in ("generation_config.json", "config.json"):
            value = files[name].get(f"{role}_token_id")
            listed = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(token_id, int) and abs(token_id) < 1 << 31 for token_id in listed):
                raise HypenetError(f"{role}_token_id of {name} in {str(directory)!r} is {value!r}; give a token id")
            if not ids or name == "generation_config.json":
                ids.extend(listed)
        named[role] = list(dict.fromkeys(ids))
    return named


def _chat_template(directory: pathlib.Path) -> str | None:
    """chat_template.jinja, or `chat_template` of tokenizer_config.json: a text, or a list of which "default" counts."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    found = _read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise HypenetError(f"chat_template of tokenizer_config.json in {str(directory)!r} is no text; correct it")
    return found


def _guessed_end(found: Tokenizer) -> tuple[int, ...]:
    ids = [found.token_id(name) for name in _END_NAMES]
    present = [token_id for token_id in ids if token_id is not None]
    return (present[0],) if len(present) == 1 else ()


def _write(file: pathlib.Path, text: str) -> None:
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise HypenetError(f"{str(file)!r} exists with other contents; save the tokenizer into another directory")
    handle, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json and its special ids. Immutable, hashable, comparable and picklable.

    json: text of the tokenizer.json; eos_id ends a document; pad_id fills up; bos_id may be None; stop_ids: every id
    that ends a generation (eos_id first). chat_template: how conversations are written, see `data.chat`.
    """

    json: str = dataclasses.field(repr=False)
    eos_id: int
    pad_id: int
    bos_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    chat_template: str | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        if not self.stop_ids:
            object.__setattr__(self, "stop_ids", (self.eos_id,))

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        library = _library(self.json, "tokenizer")
        library.encode_special_tokens = True
        return library

    @functools.cached_property
    def _recognising(self) -> tokenizers.Tokenizer:
        return _library(self.json, "tokenizer")

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id (a model's embedding may have more rows)."""
        return max(self._plain.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer.json text, in hex."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    @functools.cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The special tokens as they are written."""
        return tuple(token.content for token in self._plain.get_added_tokens_decoder().values() if token.special)

    @functools.cached_property
    def chat_fingerprint(self) -> str | None:
        """sha256 of the chat template, in hex."""
        return None if self.chat_template is None else hashlib.sha256(self.chat_template.encode()).hexdigest()

    def token(self, token_id: int) -> str | None:
        """How the tokenizer.json writes an id, None for an unknown one."""
        return self._plain.id_to_token(token_id) if token_id >= 0 else None

    def token_id(self, token: str) -> int | None:
        """The id of a token as the tokenizer.json writes it, None for an unknown one."""
        return self._plain.token_to_id(token)

    def encode(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """Ids of a text; nothing is added. `special_tokens=True` recognises special tokens written in the text."""
        library = self._recognising if special_tokens else self._plain
        return library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores; nothing is added."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, special_tokens: bool = False) -> str:
        """Text of ids; special tokens are left out unless asked for."""
        return self._plain.decode([int(token_id) for token_id in ids], skip_special_tokens=not special_tokens)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and a small tokenizer_config.json; raises HypenetError over other contents."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": self.token(self.eos_id),
            "pad_token": self.token(self.pad_id),
            "bos_token": None if self.bos_id is None else self.token(self.bos_id),
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        _write(directory / "tokenizer.json", self.json)
        _write(directory / "tokenizer_config.json", jsonlib.dumps(config, indent=2) + "\n")
