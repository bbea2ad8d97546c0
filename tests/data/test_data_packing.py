"""Packing is exact: the documents' tokens, all of them, in an order that follows from the seed, or nothing at all."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypenet_jax.data.packing import PackedTokens, pack
from hypenet_jax.data.sources import Document
from hypenet_jax.data.tokenizers import Tokenizer, byte_tokenizer
from hypenet_jax.errors import HypenetError

BYTES = byte_tokenizer()
TEXTS = [f"document {i} " + "ab" * (i % 23) for i in range(60)]


def documents(texts, source="s"):
    return (Document(source, text) for text in texts)


def small_pack(directory, texts=TEXTS, **options):
    options = {"seed": 0, "block": 16, "shard_tokens": 160, "shuffle_buffer": 1000, **options}
    return pack(documents(texts), BYTES, directory, **options)


def unpacked(directory):
    return [BYTES.decode(ids) for ids in PackedTokens(directory).documents()]


@given(
    st.lists(st.text("abé", min_size=1, max_size=40), min_size=1, max_size=30),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 50),
)
def test_every_token_is_there_once(tmp_path_factory, texts, block, blocks, buffer):
    directory = tmp_path_factory.mktemp("pack") / "tokens"
    info = small_pack(directory, texts, block=block, shard_tokens=block * blocks, shuffle_buffer=buffer)
    packed = PackedTokens(directory, BYTES)
    tokens, starts = packed.slice(0, len(packed))
    assert len(packed) == info.tokens == sum(len(text.encode()) + 1 for text in texts)
    assert info.documents == starts.sum() == len(texts)
    assert tokens.dtype == np.int32 and starts.dtype == bool
    np.testing.assert_array_equal(starts, np.r_[True, tokens[:-1] == BYTES.eos_id])
    assert tokens[-1] == BYTES.eos_id
    assert sorted(unpacked(directory)) == sorted(texts)
    if buffer == 1:
        assert unpacked(directory) == texts


@given(st.integers(0, 5000), st.integers(0, 3000))
def test_slices_wrap_around(tmp_path_factory, start, length):
    directory = tmp_path_factory.getbasetemp() / "wrap"
    small_pack(directory, sources=["texts"])
    packed = PackedTokens(directory)
    every, every_start = packed.slice(0, len(packed))
    tokens, starts = packed.slice(start, start + length)
    places = np.arange(start, start + length) % len(packed)
    np.testing.assert_array_equal(tokens, every[places])
    np.testing.assert_array_equal(starts, every_start[places])
    rows, _ = packed.rows(np.array([start, 3]), 40)
    np.testing.assert_array_equal(rows, every[(np.array([[start], [3]]) + np.arange(40)) % len(packed)])


def test_order_follows_from_the_seed(tmp_path):
    for name, seed, buffer in (("a", 1, 1000), ("b", 1, 1000), ("c", 2, 1000), ("d", 1, 8)):
        small_pack(tmp_path / name, seed=seed, shuffle_buffer=buffer)
    a, b, c, d = (unpacked(tmp_path / name) for name in "abcd")
    assert a == b
    assert a != c and a != d and a != TEXTS
    # A small buffer only looks ahead: no document comes before its turn to enter.
    assert all(TEXTS.index(text) < place + 8 for place, text in enumerate(d))
    assert PackedTokens(tmp_path / "a").fingerprint == PackedTokens(tmp_path / "b").fingerprint
    assert PackedTokens(tmp_path / "a").fingerprint != PackedTokens(tmp_path / "c").fingerprint


def test_meta_tells_what_is_there(tmp_path):
    both = [*documents(["one"], "first"), *documents(["three", ""], "second")]
    info = pack(both, BYTES, tmp_path / "p", seed=7, sources=["first", "second"])
    assert info.sources == {"first": {"documents": 1, "tokens": 4}, "second": {"documents": 1, "tokens": 6}}
    assert (info.tokens, info.documents, info.block, info.vocab_size, info.eos_id) == (10, 2, 1024, 257, 256)
    meta = json.loads((tmp_path / "p" / "meta.json").read_text())
    assert meta["request"]["tokenizer"] == BYTES.fingerprint and meta["request"]["seed"] == 7
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p"]


def test_text_of_a_special_token_ends_nothing(tmp_path):
    info = small_pack(tmp_path / "p", ["a<eos>b"])
    tokens, starts = PackedTokens(tmp_path / "p").slice(0, info.tokens)
    assert tokens.tolist() == [*b"a<eos>b", 256]
    assert starts.sum() == 1


def untouchable():
    raise AssertionError("the documents were read")
    yield


def test_same_request_is_reused(tmp_path):
    text = tmp_path / "corpus.txt"
    text.write_text("x" * 50)
    options = {"seed": 0, "sources": [str(text), "a label"]}
    first = pack(documents(TEXTS), BYTES, tmp_path / "p", **options)
    assert pack(untouchable(), BYTES, tmp_path / "p", **options) == first
    text.unlink()
    assert pack(untouchable(), BYTES, tmp_path / "p", **options) == first
    text.write_text("y" * 50)
    with pytest.raises(HypenetError, match="has changed since"):
        pack(untouchable(), BYTES, tmp_path / "p", **options)


def test_unnamed_sources_are_compared_by_tokens(tmp_path):
    first = small_pack(tmp_path / "p")
    assert small_pack(tmp_path / "p") == first
    with pytest.raises(HypenetError, match="other tokens"):
        small_pack(tmp_path / "p", TEXTS[1:])
    with pytest.raises(HypenetError, match="without naming its sources"):
        small_pack(tmp_path / "p", sources=["s"])
    assert sorted(unpacked(tmp_path / "p")) == sorted(TEXTS)
    assert [file.name for file in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"block": 8}, "block 16, not 8"),
        ({"shuffle_buffer": 5}, "shuffle_buffer"),
        ({"shard_tokens": 320}, "shard_tokens"),
        ({"sources": ["other"]}, "packed from"),
    ],
)
def test_another_request_is_refused(tmp_path, changed, message):
    small_pack(tmp_path / "p", sources=["s"])
    with pytest.raises(HypenetError, match=message):
        small_pack(tmp_path / "p", **{"sources": ["s"], **changed})


def test_foreign_directories_are_left_alone(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "letter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("p", "file"):
        with pytest.raises(HypenetError, match="holds no packed tokens"):
            small_pack(tmp_path / name)
    assert (tmp_path / "p" / "letter.txt").read_text() == "mine"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "p"]


def test_an_empty_directory_is_used(tmp_path):
    (tmp_path / "p").mkdir()
    assert small_pack(tmp_path / "p").documents == len(TEXTS)


def test_nothing_is_left_of_a_failed_pack(tmp_path):
    def failing():
        yield Document("s", "text")
        raise HypenetError("line 7 is broken")

    with pytest.raises(HypenetError, match="line 7"):
        pack(failing(), BYTES, tmp_path / "p", seed=0)
    with pytest.raises(HypenetError, match="corpus is empty"):
        small_pack(tmp_path / "p", [])
    with pytest.raises(HypenetError, match="corpus is empty"):
        small_pack(tmp_path / "p", ["", ""])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changed", [{"block": 0}, {"shard_tokens": 15}, {"shuffle_buffer": 0}])
def test_wrong_sizes(tmp_path, changed):
    with pytest.raises(HypenetError, match=f"{next(iter(changed))} is {next(iter(changed.values()))}"):
        small_pack(tmp_path / "p", **changed)


def test_damaged_packs_are_refused(tmp_path):
    small_pack(tmp_path / "p")
    shards = sorted((tmp_path / "p").glob("tokens-*"))
    assert len(shards) > 3
    for name, damage in (
        ("missing", lambda file: file.unlink()),
        ("short", lambda file: file.write_bytes(file.read_bytes()[:-1])),
    ):
        shutil.copytree(tmp_path / "p", tmp_path / name)
        damage(tmp_path / name / shards[2].name)
        with pytest.raises(HypenetError, match="tokens-00002.* is missing or cut short"):
            PackedTokens(tmp_path / name)
        with pytest.raises(HypenetError, match="missing or cut short|other tokens"):
            PackedTokens(tmp_path / name, BYTES)
    held = bytearray(shards[2].read_bytes())
    for name, damaged in (("all", bytes(len(held))), ("within", held[:100] + b"x" * 200 + held[300:])):
        shutil.copytree(tmp_path / "p", tmp_path / name)
        (tmp_path / name / shards[2].name).write_bytes(damaged)
        with pytest.raises(HypenetError, match=f"a file in .*{name} is damaged .*remove the directory and pack again"):
            PackedTokens(tmp_path / name).rows(np.array([0]), 3 * len(PackedTokens(tmp_path / "p")) // 4)
    for contents, message in (("{", "is broken"), ("{}", "is broken"), ("[1]", "is broken")):
        (tmp_path / "p" / "meta.json").write_text(contents)
        with pytest.raises(HypenetError, match=message):
            PackedTokens(tmp_path / "p")
    with pytest.raises(HypenetError, match="holds no packed tokens"):
        PackedTokens(tmp_path / "absent")


def test_another_format_is_refused(tmp_path):
    small_pack(tmp_path / "p")
    meta = tmp_path / "p" / "meta.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(HypenetError, match="format 9"):
        PackedTokens(tmp_path / "p")


def test_foreign_tokenizer_is_refused(tmp_path):
    small_pack(tmp_path / "p", sources=["s"])
    other = Tokenizer(json=BYTES.json.replace("<eos>", "<end>"), eos_id=256, pad_id=256)
    with pytest.raises(HypenetError, match="packed with the tokenizer"):
        PackedTokens(tmp_path / "p", other)
    with pytest.raises(HypenetError, match="packed with tokenizer"):
        pack(documents(TEXTS), other, tmp_path / "p", seed=0, block=16, shard_tokens=160, shuffle_buffer=1000)


def test_wrong_range(tmp_path):
    small_pack(tmp_path / "p")
    with pytest.raises(HypenetError, match="5..4"):
        PackedTokens(tmp_path / "p").slice(5, 4)


def test_packed_tokens_travel_to_other_processes(tmp_path):
    small_pack(tmp_path / "p")
    packed = PackedTokens(tmp_path / "p")
    before = packed.slice(5, 90)
    after = pickle.loads(pickle.dumps(packed)).slice(5, 90)
    np.testing.assert_array_equal(before[0], after[0])


def test_long_documents_come_back_whole(tmp_path, monkeypatch):
    # Documents longer than one read of `documents()`.
    monkeypatch.setattr("hypenet_jax.data.packing._SCAN_TOKENS", 7)
    small_pack(tmp_path / "p")
    assert sorted(unpacked(tmp_path / "p")) == sorted(TEXTS)
