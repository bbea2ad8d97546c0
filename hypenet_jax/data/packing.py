"""Documents become one endless stream of tokens on disk, packed once and exactly.

Every document ends in the tokenizer's end-of-document id, and the documents follow each other without a gap. The
stream is cut into blocks, a block is one ArrayRecord of little-endian uint32; the highest bit marks a document's first
token, the next one the tokens of a conversation that its assistant did not write. meta.json is the directory's table of
contents; the zeros that fill up the last block are not counted.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from hypenet_jax.data.chat import encode_conversation
from hypenet_jax.data.pack_meta import CHAT_FORMAT, META, PackedInfo, check_request, read_meta, request_of
from hypenet_jax.data.records import Records
from hypenet_jax.data.sources import Document
from hypenet_jax.data.tokenizers import Tokenizer
from hypenet_jax.errors import HypenetError

_START, _PROMPT = np.uint32(1 << 31), np.uint32(1 << 30)
_SCAN_TOKENS = 1 << 20
# One call of the tokenizer: enough for all cores, little enough for their memory.
_BATCH_CHARS = 1 << 20
_BATCH_DOCUMENTS = 1024


def pack(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    *,
    seed: int,
    block: int = 1024,
    shard_tokens: int = 1 << 26,
    shuffle_buffer: int = 1 << 16,
    sources: Sequence[str] | None = None,
) -> PackedInfo:
    """Tokenizes and packs documents into `directory`; returns what its meta.json says.

    documents: each non-empty one is tokenized and ended by tokenizer.eos_id; conversations are written by the
      tokenizer's chat template, see `data.chat.encode_conversation`. Their order is a shuffle by `seed`
      through a buffer of `shuffle_buffer` documents. block: tokens a record; shard_tokens: tokens a file, rounded
      down to blocks.
    sources: what the documents are, in words; paths among them are identified by their contents. A directory that
      was packed from the same request is reused and `documents` is not touched. Without `sources` the documents are
      packed again and the tokens compared.
    The directory appears complete or not at all. Raises HypenetError for a directory that holds anything else than
    this pack, and for an empty corpus.
    """
    directory = pathlib.Path(directory)
    request = request_of(tokenizer, seed, block, shard_tokens, shuffle_buffer, sources)
    if _occupied(directory):
        found = read_meta(directory)
        check_request(directory, found, request)
        if sources is not None:
            PackedTokens(directory, tokenizer)
            return found
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    try:
        info = _write_pack(_shuffled(documents, seed, shuffle_buffer), tokenizer, temporary, request)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        return _publish(temporary, directory, info)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _occupied(directory: pathlib.Path) -> bool:
    return directory.exists() and (not directory.is_dir() or any(directory.iterdir()))


def _shuffled(documents: Iterable[Document], seed: int, size: int) -> Iterator[Document]:
    """Draws from a buffer that is refilled as it is drawn from; the whole order follows from the seed."""
    # Only `random()` promises the same numbers under every version of Python.
    rng = random.Random(f"packing {seed}")
    buffer: list[Document] = []
    for document in documents:
        if len(buffer) < size:
            buffer.append(document)
            continue
        place = int(rng.random() * size)
        chosen, buffer[place] = buffer[place], document
        yield chosen
    while buffer:
        place = int(rng.random() * len(buffer))
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        yield buffer.pop()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _write_pack(
    documents: Iterable[Document], tokenizer: Tokenizer, directory: pathlib.Path, request: dict[str, Any]
) -> PackedInfo:
    counts: dict[str, dict[str, int]] = {}
    chat = False
    writer = _ShardWriter(directory, request["block"], request["shard_tokens"])
    try:
        for batch in _batches(documents):
            for document, tokens in zip(batch, _marked(batch, tokenizer), strict=True):
                if len(tokens) == 1:
                    continue
                count = counts.setdefault(document.source, {"documents": 0, "tokens": 0})
                count["documents"] += 1
                count["tokens"] += len(tokens)
                tokens[0] |= _START
                writer.add(tokens)
                chat |= document.conversation is not None
    finally:
        writer.close()
    if not writer.tokens:
        raise HypenetError("the corpus is empty: no document has a token; give sources with text in them")
    info = PackedInfo(
        tokens=writer.tokens,
        documents=sum(count["documents"] for count in counts.values()),
        sha256=writer.digest.hexdigest(),
        shards=writer.shards,
        sources=dict(sorted(counts.items())),
        request=request | ({"format": CHAT_FORMAT} if chat else {}),
        chat_template=tokenizer.chat_fingerprint if chat else None,
    )
    (directory / META).write_text(info.to_json(), encoding="utf-8")
    return info


def _marked(documents: list[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Each document's ids with its end, uint32 [n], a conversation's prompts marked."""
    plain = iter(tokenizer.encode_batch([d.text for d in documents if d.conversation is None]))
    rows = []
    for document in documents:
        if document.conversation is None:
            rows.append(np.array([*next(plain), tokenizer.eos_id], np.uint32))
            continue
        ids, written = encode_conversation(tokenizer, document.conversation)
        tokens = np.array(ids, np.uint32)
        tokens[~np.array(written)] |= _PROMPT
        rows.append(tokens)
    return rows


def _publish(temporary: pathlib.Path, directory: pathlib.Path, info: PackedInfo) -> PackedInfo:
    try:
        os.rename(temporary, directory)
        return info
    except OSError:
        # Another process may have packed the same in the meantime.
        if not _occupied(directory):
            raise
    found = read_meta(directory)
    check_request(directory, found, info.request)
    if found.sha256 != info.sha256:
        raise HypenetError(
            f"{str(directory)!r} holds other tokens than these documents give; choose another directory or remove it"
        )
    return found


class PackedTokens:
    """The packed stream, read at random: `len(packed)` tokens, repeated without end.

    Raises HypenetError for a directory that is no complete pack and, where a tokenizer is given, for tokens of
    another one. Picklable: files are opened on the first read.
    """

    def __init__(self, directory: str | os.PathLike[str], tokenizer: Tokenizer | None = None):
        self.directory = pathlib.Path(directory)
        self.info = read_meta(self.directory)
        if tokenizer is not None:
            self._check_tokenizer(tokenizer)
        files = []
        for shard in self.info.shards:
            file = self.directory / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise HypenetError(
                    f"packed file {str(file)!r} is missing or cut short; remove the directory and pack again"
                )
            files.append(file)
        self._blocks = Records(files, "remove the directory and pack again")

    def __len__(self) -> int:
        return self.info.tokens

    @property
    def fingerprint(self) -> str:
        """sha256 of the stream: two packs with the same one hold the same tokens in the same order."""
        return self.info.sha256

    def slice(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [start, stop) of the endless stream: (int32 [n], bool [n] True at a document's first token)."""
        if not 0 <= start <= stop:
            raise HypenetError(
                f"token range {start}..{stop} is invalid; it must begin at 0 or later and not end before"
            )
        tokens, starts = self.rows(np.array([start]), stop - start)
        return tokens[0], starts[0]

    def rows(self, starts_B: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens of the endless stream from each start: (int32 [B, length], bool [B, length]), as `slice`."""
        tokens_BS, starts_BS, _ = self.rows_with_prompts(starts_B, length)
        return tokens_BS, starts_BS

    def rows_with_prompts(self, starts_B: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `rows`, and bool [B, length]: True at the tokens of a conversation that its assistant did not write."""
        runs = [list(self._runs(int(start), length)) for start in starts_B]
        block = self.info.block
        wanted = sorted(
            {number for row in runs for run in row for number in range(run[0] // block, -(-run[1] // block))}
        )
        records = dict(zip(wanted, self._blocks(wanted), strict=True))
        marked_BS = np.empty((len(runs), length), np.uint32)
        for marked_S, row in zip(marked_BS, runs, strict=True):
            place = 0
            for start, stop in row:
                joined = b"".join(records[number] for number in range(start // block, -(-stop // block)))
                marked_S[place : place + stop - start] = np.frombuffer(joined, "<u4", stop - start, start % block * 4)
                place += stop - start
        tokens_BS = (marked_BS & ~(_START | _PROMPT)).astype(np.int32)
        return tokens_BS, marked_BS >= _START, (marked_BS & _PROMPT).astype(bool)

    def _runs(self, start: int, length: int) -> Iterator[tuple[int, int]]:
        """The range from `start` on, wrapped around the end of the stream: (start, stop) within it."""
        while length:
            begin = start % len(self)
            end = min(begin + length, len(self))
            yield begin, end
            start, length = start + end - begin, length - (end - begin)

    def documents(self) -> Iterator[np.ndarray]:
        """Every document once, in the order of the stream: int32 [n], its end-of-document id included."""
        pending: list[np.ndarray] = []
        for start in range(0, len(self), _SCAN_TOKENS):
            tokens, starts = self.slice(start, min(start + _SCAN_TOKENS, len(self)))
            first, *others = np.split(tokens, np.flatnonzero(starts))
            pending.append(first)
            for document in others:
                if any(map(len, pending)):
                    yield np.concatenate(pending)
                pending = [document]
        yield np.concatenate(pending)

    def _check_tokenizer(self, tokenizer: Tokenizer) -> None:
        packed = self.info.request["tokenizer"]
        if packed != tokenizer.fingerprint:
            raise HypenetError(
                f"{str(self.directory)!r} was packed with the tokenizer {packed[:12]}, the model has "
                f"{tokenizer.fingerprint[:12]}; pack again with the model's own"
            )
        template = self.info.chat_template
        if template not in (None, tokenizer.chat_fingerprint):
            raise HypenetError(
                f"{str(self.directory)!r} was packed with the chat template {template[:12]}, the model has "
                f"{(tokenizer.chat_fingerprint or 'none')[:12]}; pack again with the model's own"
            )


class _ShardWriter:
    """Cuts the stream into blocks and files. `tokens` counts what was added; the last block is filled up with zeros."""

    def __init__(self, directory: pathlib.Path, block: int, shard_tokens: int):
        self.tokens = 0
        self.shards: list[dict[str, Any]] = []
        self.digest = hashlib.sha256()
        self._directory, self._block, self._shard_blocks = directory, block, shard_tokens // block
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._file: Any = None

    def add(self, tokens: np.ndarray) -> None:
        self._pending.append(tokens)
        self._pending_tokens += len(tokens)
        self.tokens += len(tokens)
        if self._pending_tokens >= max(self._block, _SCAN_TOKENS // 16):
            self._flush()

    def close(self) -> None:
        self._flush()
        rest = self._pending_tokens
        if rest:
            self._pending.append(np.zeros(self._block - rest, np.uint32))
            self._write(np.concatenate(self._pending), rest)
        self._finish_file()

    def _flush(self) -> None:
        if self._pending_tokens < self._block:
            return
        joined = np.concatenate(self._pending)
        whole = len(joined) // self._block * self._block
        for start in range(0, whole, self._block):
            self._write(joined[start : start + self._block], self._block)
        self._pending, self._pending_tokens = [joined[whole:]], len(joined) - whole

    def _write(self, block: np.ndarray, counted: int) -> None:
        if self._file is None:
            name = f"tokens-{len(self.shards):05d}.array_record"
            self._file = array_record_module.ArrayRecordWriter(str(self._directory / name), "group_size:1")
            self.shards.append({"file": name, "blocks": 0, "bytes": 0})
        contents = block.astype("<u4", copy=False).tobytes()
        self.digest.update(contents[: 4 * counted])
        self._file.write(contents)
        self.shards[-1]["blocks"] += 1
        if self.shards[-1]["blocks"] == self._shard_blocks:
            self._finish_file()

    def _finish_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self.shards[-1]["bytes"] = (self._directory / self.shards[-1]["file"]).stat().st_size
