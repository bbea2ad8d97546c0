"""What a pack says about itself (meta.json), and whether it is the pack that is asked for."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from hypenet_jax.data.sources import source_identity
from hypenet_jax.data.tokenizers import Tokenizer
from hypenet_jax.errors import HypenetError

# 2: some tokens carry the mark of a prompt. A pack of plain text is written in format 1, which has none.
FORMAT, CHAT_FORMAT = 1, 2
META = "meta.json"


def request_of(
    tokenizer: Tokenizer,
    seed: int,
    block: int,
    shard_tokens: int,
    shuffle_buffer: int,
    sources: Sequence[str] | None,
) -> dict[str, Any]:
    """What a pack is asked to be; paths among the sources are identified by their contents."""
    if block < 1:
        raise HypenetError(f"block is {block}; a record holds at least 1 token")
    if shard_tokens < block:
        raise HypenetError(f"shard_tokens is {shard_tokens}; a file holds at least one block of {block}")
    if shuffle_buffer < 1:
        raise HypenetError(f"shuffle_buffer is {shuffle_buffer}; it holds at least 1 document (1 keeps the order)")
    if tokenizer.vocab_size > 1 << 30:
        raise HypenetError(f"tokenizer has {tokenizer.vocab_size} tokens; a packed token has 30 bits")
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "seed": seed,
        "block": block,
        "shard_tokens": shard_tokens,
        "shuffle_buffer": shuffle_buffer,
        "sources": None if sources is None else [[source, source_identity(source)] for source in sources],
    }


def read_meta(directory: pathlib.Path) -> PackedInfo:
    """The meta.json of a pack; HypenetError where there is none or a broken one."""
    file = directory / META
    if not file.is_file():
        raise HypenetError(f"{str(directory)!r} holds no packed tokens (no {META}); pack into another directory")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        info = PackedInfo(**found)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise HypenetError(f"{str(file)!r} is broken ({error}); remove the directory and pack again") from error
    if info.request.get("format") not in (FORMAT, CHAT_FORMAT):
        raise HypenetError(
            f"{str(file)!r} has format {info.request.get('format')}, not {FORMAT} or {CHAT_FORMAT}; pack again"
        )
    return info


def check_request(directory: pathlib.Path, found: PackedInfo, request: dict[str, Any]) -> None:
    """Raises HypenetError, naming the difference, unless a found pack is what is asked for."""
    for name, wanted in request.items():
        held = found.request.get(name)
        # The format follows from the documents, and those from the sources.
        if name not in ("sources", "format") and held != wanted:
            raise HypenetError(
                f"{str(directory)!r} was packed with {name} {held!r}, not {wanted!r}; choose another or remove it"
            )
    # Without a list on both sides only the tokens can tell, and they are compared.
    held, wanted = found.request["sources"], request["sources"]
    if held is None or wanted is None:
        if wanted is not None:
            raise HypenetError(f"{str(directory)!r} was packed without naming its sources; choose another or remove it")
        return
    named, asked = [source for source, _ in held], [source for source, _ in wanted]
    if named != asked:
        raise HypenetError(f"{str(directory)!r} was packed from {named}, not {asked}; choose another or remove it")
    for (source, before), (_, now) in zip(held, wanted, strict=True):
        # A source that has gone since (None) takes nothing away from a finished pack.
        if now is not None and now != before:
            raise HypenetError(
                f"source {source!r} has changed since {str(directory)!r} was packed; remove that directory to pack anew"
            )


@dataclasses.dataclass(frozen=True)
class PackedInfo:
    """meta.json: counted tokens and documents, the sha256 of the marked stream, the files, and what was asked for.

    shards: {"file", "blocks", "bytes"} each; sources: {"documents", "tokens"} of each source; request: tokenizer
    fingerprint, vocab_size, eos_id, seed, block, shard_tokens, shuffle_buffer and the sources by name. chat_template:
    sha256 of the template that conversations were written with, None where there is none.
    """

    tokens: int
    documents: int
    sha256: str
    shards: list[dict[str, Any]]
    sources: dict[str, dict[str, int]]
    request: dict[str, Any]
    chat_template: str | None = None

    def to_json(self) -> str:
        """The text of meta.json; what plain text has no use for is left out."""
        values = dataclasses.asdict(self)
        if self.chat_template is None:
            del values["chat_template"]
        return json.dumps(values, indent=2) + "\n"

    @property
    def block(self) -> int:
        """Tokens a record."""
        return self.request["block"]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id of the tokenizer."""
        return self.request["vocab_size"]

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""
        return self.request["eos_id"]
