"""Every kind of source is read in a fixed order, and every broken one is refused in a sentence."""

from __future__ import annotations

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from hypenet_jax.data.sources import Document, read_documents, source_identity
from hypenet_jax.data.stdlib_docs import stdlib_documents
from hypenet_jax.errors import HypenetError


def texts(spec):
    return [document.text for document in read_documents(spec)]


def parquet(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_folder_of_mixed_kinds(tmp_path):
    (tmp_path / "b.md").write_bytes("\ufeffmärk\r\ndown".encode())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_text("text")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "h.txt").write_text("hidden")
    (tmp_path / "picture.png").write_bytes(b"\x00\xff")
    (tmp_path / "c.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": ""}\n{"text": "two"}')
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"text": "three"}) + "\n")
    parquet(tmp_path / "e.parquet", {"text": ["four", " ", "five", "six"], "score": [1, 2, 3, 4]}, row_group_size=2)
    assert texts(tmp_path) == ["text", "märk\r\ndown", "one", "two", "three", "four", "five", "six"]
    assert next(read_documents(tmp_path)) == Document(str(tmp_path), "text")


def test_single_files(tmp_path):
    (tmp_path / "a.rst").write_text("x")
    assert texts(str(tmp_path / "a.rst")) == ["x"]
    large = pyarrow.array(["y"], pyarrow.large_string())
    assert texts(parquet(tmp_path / "b.parquet", {"text": large})) == ["y"]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"  \n", "holds no text"),
        ("a.txt", b"abc\xff", r"no UTF-8 text \(byte 3\)"),
        ("a.txt", b"abc\x00", "binary"),
        ("a.bin", b"abc", "no known kind"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "^line 2 of .* is broken json"),
        ("a.jsonl", b"\xff\xfe\n", "^line 1 of .* is broken json"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "^line 1 of .* is broken json"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "^line 1 of .* is broken json"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}', "^line 3 of .* field 'text'"),
        ("a.jsonl", b"[1]", "^line 1 of .* field 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}', "^line 1 of .* surrogate"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.jsonl.gz", b"not gzip", "is broken after line 0"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-12], "is broken after line"),
        ("a.parquet", b"PAR1 nothing", "no readable parquet"),
    ],
)
def test_broken_files(tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(HypenetError, match=message):
        texts(tmp_path / name)


@pytest.mark.parametrize("spec", ["gs://bkt/text", "gs://bkt/a.jsonl", "retrieval:3:haystack=gs://bkt/text"])
def test_a_bucket_is_named_as_it_was_given(spec):
    path = spec.partition("=")[2] or spec
    with pytest.raises(HypenetError) as caught:
        texts(spec)
    assert f"source '{path}' is in no file system; mount its bucket" in str(caught.value)
    assert "launch/tpu_pod.sh" in str(caught.value) and "\n" not in str(caught.value)


def test_broken_parquet_columns(tmp_path):
    with pytest.raises(HypenetError, match=r"columns \['body'\]; one must be 'text'"):
        texts(parquet(tmp_path / "a.parquet", {"body": ["x"]}))
    with pytest.raises(HypenetError, match="holds int64"):
        texts(parquet(tmp_path / "b.parquet", {"text": [1]}))
    with pytest.raises(HypenetError, match="row 1 .* has no text"):
        texts(parquet(tmp_path / "c.parquet", {"text": ["x", None]}))


def test_missing_and_empty_places(tmp_path):
    with pytest.raises(HypenetError, match="does not exist"):
        texts(tmp_path / "absent")
    with pytest.raises(HypenetError, match="no file of a known kind"):
        texts(tmp_path)


def test_stdlib_is_documentation_in_a_fixed_order():
    found = texts("stdlib")
    assert found == list(stdlib_documents())
    assert len(found) > 200 and sum(map(len, found)) > 500_000
    module = next(text for text in found if text.startswith("Module textwrap\n"))
    assert "textwrap.dedent(text)\n    Remove any common leading whitespace" in module
    assert "class textwrap.TextWrapper" in module
    names = [text.split("\n", 1)[0].removeprefix("Module ") for text in found if text.startswith("Module ")]
    assert len(names) == len(set(names))
    assert not [name for name in names if name.split(".")[0] in ("test", "idlelib", "lib2to3", "encodings")]
    assert not [name for name in names if ".test" in name or "site-packages" in name]


def test_retrieval_source_options(tmp_path):
    (tmp_path / "a:b.txt").write_text("Crocodiles sing.")
    found = texts("retrieval:30:seed=3:max_chars=300:styles=ruler+sentences")
    assert len(found) == 30 and max(map(len, found)) <= 300
    assert found != texts("retrieval:30:max_chars=300:styles=ruler+sentences")
    with_prose = texts(f"retrieval:30:max_chars=400:styles=ruler:haystack={tmp_path}/a:b.txt")
    assert any("Crocodiles sing." in text for text in with_prose)
    assert next(read_documents("retrieval:1")).source == "retrieval:1"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("retrieval", "count ''"),
        ("retrieval:x", "count 'x'"),
        ("retrieval:-1", "count '-1'"),
        ("retrieval:0", "count is 0"),
        ("retrieval:5:sed=1", "'sed=1'"),
        ("retrieval:5:seed", "'seed'"),
        ("retrieval:5:seed=x", "seed 'x'"),
        ("retrieval:5:max_chars=10", "max_chars is 10"),
        ("retrieval:5:styles=poem", "'poem' is unknown"),
        ("retrieval:5:haystack=absent.txt", "absent.txt"),
    ],
)
def test_wrong_retrieval_options(spec, message):
    with pytest.raises(HypenetError, match=message):
        texts(spec)


def test_identity_follows_contents(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("x")
    before = source_identity(folder)
    (folder / "ignored.png").write_text("y")
    assert source_identity(folder) == before
    (folder / "a.txt").write_text("y")
    changed = source_identity(folder)
    (folder / "a.txt").rename(folder / "b.txt")
    assert len({before, changed, source_identity(folder)}) == 3
    assert source_identity("stdlib") is source_identity("retrieval:3") is source_identity(tmp_path / "absent") is None
