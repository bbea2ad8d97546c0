"""Documents to train on: text files, folders, jsonl, parquet, and the built-in sources "stdlib" and "retrieval:...".

read_documents("corpus/") reads the .txt .md .rst .jsonl .jsonl.gz .parquet files below a folder, "stdlib" is the
documentation inside the Python standard library, and "retrieval:20000:seed=1:max_chars=512" makes synthetic documents
(further keys: styles=pairs+ruler and haystack=SOURCE).
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from hypenet_jax.data.chat import Conversation, parse_row
from hypenet_jax.data.retrieval import retrieval_documents
from hypenet_jax.data.stdlib_docs import stdlib_documents
from hypenet_jax.errors import HypenetError

TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".parquet")
_WHOLE_HASH_BYTES = 64 << 20
_HASH_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and the source (as it was asked for) that it came from.

    Where the document is a conversation, `text` is what was said in it; it is packed as the chat template writes it.
    """

    source: str
    text: str
    conversation: Conversation | None = None


def read_documents(spec: str | os.PathLike[str]) -> Iterator[Document]:
    """The documents of a source, in a fixed order; empty rows and lines are left out.

    spec: a text file (one document), a .jsonl or .jsonl.gz file (field "text", or "messages" for a conversation of
    [{"role", "content"}, ..] with the roles system, user and assistant), a .parquet file (column "text", read
    by row group), a folder of such files (searched to the bottom, hidden entries left out, sorted by path), "stdlib",
    or "retrieval:<count>[:key=value...]" with the keys seed, max_chars, styles (joined by "+") and haystack (a source
    whose prose surrounds the needles). A file called like a built-in source is written "./stdlib".
    Raises HypenetError for a missing, empty, binary or malformed source, naming file and line or row, and for a path in
    a bucket.
    """
    source = os.fspath(spec)
    if source == "stdlib":
        texts: Iterator[str | Conversation] = stdlib_documents()
    elif is_synthetic(source):
        texts = _retrieval(source, source.partition(":")[2])
    elif "://" in source:
        raise HypenetError(
            f"source {source!r} is in no file system; mount its bucket (launch/tpu_pod.sh and launch/gke.sh do, at "
            "/mnt/buckets/BUCKET) and give the path there"
        )
    else:
        texts = _files_texts(source)
    found = False
    for text in texts:
        if isinstance(text, Conversation):
            found = True
            yield Document(source, text.text, text)
        elif text and not text.isspace():
            found = True
            yield Document(source, text)
    if not found:
        raise HypenetError(f"source {source!r} holds no text; give one with documents in it")


def source_identity(spec: str | os.PathLike[str]) -> str | None:
    """What the contents of a source depend on: a sha256 for files, None for built-in sources and where nothing is.

    Files up to 64 MiB are hashed whole, larger ones by their size and 1 MiB at the beginning, the middle and the end.
    """
    source = os.fspath(spec)
    path = pathlib.Path(source)
    if source == "stdlib" or is_synthetic(source) or not path.exists():
        return None
    digest = hashlib.sha256()
    for file in _files(path):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path) if file != path else file.name}\0{size}\0".encode())
        starts = (0, size // 2, size - _HASH_CHUNK) if size > _WHOLE_HASH_BYTES else range(0, size, _HASH_CHUNK)
        with file.open("rb") as stream:
            for start in starts:
                stream.seek(start)
                digest.update(stream.read(_HASH_CHUNK))
    return digest.hexdigest()


def read_text(file: pathlib.Path) -> str:
    """The contents of a text file; HypenetError where they are no UTF-8 text."""
    contents = file.read_bytes()
    try:
        text = contents.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HypenetError(f"source file {str(file)!r} is no UTF-8 text (byte {error.start}); convert it") from error
    if "\0" in text:
        raise HypenetError(f"source file {str(file)!r} is binary (it holds a zero byte); give text")
    return text


def read_rows(file: pathlib.Path) -> Iterator[tuple[Any, str]]:
    """(value, the line it stands in, in words) of each line of a .jsonl or .jsonl.gz file; empty lines are left out.

    Raises HypenetError, naming the line, for broken JSON and a broken archive.
    """
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if not line.isspace():
                    where = f"line {number} of source file {str(file)!r}"
                    yield _row(line, where), where
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise HypenetError(f"source file {str(file)!r} is broken after line {number} ({error}); restore it") from error


def is_synthetic(source: str) -> bool:
    """Whether a source makes its documents: "retrieval:...", pages of random facts and what was asked of them."""
    return source.partition(":")[0] == "retrieval"


def _retrieval(source: str, options: str) -> Iterator[str]:
    count, *pairs = options.split(":")
    known: dict[str, str] = {}
    for position, pair in enumerate(pairs):
        key, equals, value = pair.partition("=")
        if key == "haystack":
            # The rest of the text is the haystack's own source, which may contain colons.
            known[key] = ":".join([value, *pairs[position + 1 :]])
            break
        if not equals or key not in ("seed", "max_chars", "styles"):
            raise HypenetError(
                f"source {source!r} has the option {pair!r}; use seed=, max_chars=, styles= or haystack="
            )
        known[key] = value
    numbers = {"count": count, "seed": known.get("seed", "0"), "max_chars": known.get("max_chars", "512")}
    for key, value in numbers.items():
        if not (value.isascii() and value.isdecimal()):
            raise HypenetError(f"source {source!r} has {key} {value!r}; write a whole number")
    haystack = None
    if "haystack" in known:
        haystack = "\n".join(document.text for document in read_documents(known["haystack"]))
    return retrieval_documents(
        int(numbers["count"]),
        int(numbers["seed"]),
        int(numbers["max_chars"]),
        styles=known["styles"].split("+") if "styles" in known else None,
        haystack=haystack,
    )


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.exists():
        raise HypenetError(
            f"source {str(path)!r} does not exist; give a file, a folder, 'stdlib' or 'retrieval:<count>'"
        )
    if not path.is_dir():
        if not path.name.endswith(SUFFIXES):
            raise HypenetError(f"source {str(path)!r} is of no known kind; use {', '.join(SUFFIXES)}")
        return [path]
    files = [
        file
        for file in path.rglob("*")
        if file.name.endswith(SUFFIXES)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise HypenetError(f"source {str(path)!r} holds no file of a known kind; use {', '.join(SUFFIXES)}")
    return sorted(files, key=lambda file: file.relative_to(path).parts)


def _files_texts(source: str) -> Iterator[str | Conversation]:
    for file in _files(pathlib.Path(source)):
        if file.stat().st_size == 0:
            raise HypenetError(f"source file {str(file)!r} is empty; fill or remove it")
        if file.name.endswith(TEXT_SUFFIXES):
            yield read_text(file)
        elif file.suffix == ".parquet":
            yield from _parquet_texts(file)
        else:
            for row, where in read_rows(file):
                yield _row_text(row, where)


def _row(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets too deep
        raise HypenetError(f"{where} is broken json ({error}); mend or remove it") from error


def _row_text(row: Any, where: str) -> str | Conversation:
    if isinstance(row, dict) and "messages" in row:
        if "text" in row:
            raise HypenetError(f"{where} has both 'text' and 'messages'; keep one of them")
        return parse_row(row, where)
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise HypenetError(f"{where} has no string in the field 'text' and no 'messages'; mend or remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise HypenetError(f"{where} holds half a surrogate pair, which is no text; mend or remove it") from error
    return text


def _parquet_texts(file: pathlib.Path) -> Iterator[str]:
    # Imported here: text files need no pyarrow.
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            schema = table.schema_arrow
            if "text" not in schema.names:
                raise HypenetError(f"source file {str(file)!r} has the columns {schema.names}; one must be 'text'")
            kind = schema.field("text").type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise HypenetError(f"column 'text' of source file {str(file)!r} holds {kind}; it must hold strings")
            row = 0
            for group in range(table.num_row_groups):
                for text in table.read_row_group(group, columns=["text"]).column("text").to_pylist():
                    if text is None:
                        raise HypenetError(f"row {row} of source file {str(file)!r} has no text; fill or remove it")
                    row += 1
                    yield text
    except (pyarrow.ArrowException, OSError) as error:
        raise HypenetError(f"source file {str(file)!r} is no readable parquet file ({error}); restore it") from error
