"""What is held out for measurements: natural prose that no stage trains on, each text once."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from hypenet_jax.data.packing import PackedTokens
from hypenet_jax.data.tokenizers import byte_tokenizer
from hypenet_jax.errors import HypenetError
from hypenet_jax.halo import corpus
from hypenet_jax.halo.probes import probes
from hypenet_jax.halo.settings import DataConfig, SelectConfig

TOKENIZER = byte_tokenizer()
PAGES = "retrieval:60:seed=3:max_chars=400"


def texts(packed: PackedTokens) -> list[str]:
    return [TOKENIZER.decode(tokens.tolist()) for tokens in packed.documents()]


@pytest.fixture
def rows(documents_file) -> list[str]:
    return [json.loads(line)["text"] for line in documents_file.read_text().splitlines()]


def packs(directory: pathlib.Path, *sources: str, **settings) -> tuple[PackedTokens, PackedTokens]:
    return corpus.packed_corpus(DataConfig(sources, **settings), TOKENIZER, directory, lambda _: None)


def test_held_out_is_prose_alone_and_each_text_once(documents_file, rows, tmp_path):
    source = str(documents_file)
    train, held = packs(tmp_path, source, PAGES, source, heldout_share=0.3)
    expected = [text for text in rows if corpus.is_heldout(text, 0.3)]
    assert sorted(texts(held)) == sorted(expected) and 10 < len(expected) < 50
    # Training has the pages, but for their share, and the prose as often as it is listed.
    trained = texts(train)
    assert set(expected).isdisjoint(trained) and trained.count(next(t for t in rows if t not in expected)) == 2
    assert 10 < len(set(trained) - set(rows)) < 60
    assert set(held.info.sources) == {source}


def test_named_held_out_sources_lose_their_pages_too(documents_file, rows, tmp_path):
    train, held = packs(tmp_path, PAGES, heldout=(PAGES, str(documents_file)))
    assert sorted(texts(held)) == sorted(rows) and train.info.documents == 60
    # A pack is taken as it lies, beside pages as without them.
    for name, heldout in (("a", ()), ("b", (PAGES,))):
        _, again = packs(tmp_path / name, PAGES, heldout=(*heldout, str(held.directory)))
        assert again.directory == held.directory


def test_stage_3_has_a_text_of_its_own_without_what_is_held_out(documents_file, rows, tmp_path):
    said, data = [], DataConfig((PAGES, str(documents_file)), heldout_share=0.3)
    _, held = packs(tmp_path, *data.sources, heldout_share=0.3)
    for _ in range(2):
        own = corpus.finetune_corpus(data, (str(documents_file),), TOKENIZER, tmp_path, said.append)
    assert sorted([*texts(own), *texts(held)]) == sorted(rows)
    assert pathlib.Path(own.directory) == tmp_path / "finetune"
    assert [line.split()[0] for line in said] == ["packing", "stage", "stage"]
    with pytest.raises(HypenetError, match="finetune_sources is the packed .*, from which nothing can be held out"):
        corpus.finetune_corpus(data, (str(own.directory),), TOKENIZER, tmp_path / "b", said.append)
    named = DataConfig((PAGES,), heldout=(str(documents_file),))
    again = corpus.finetune_corpus(named, (str(own.directory),), TOKENIZER, tmp_path / "b", said.append)
    assert again.directory == own.directory and not (tmp_path / "b").exists()


@pytest.mark.parametrize("settings", [{}, {"heldout": ("retrieval:5",)}])
def test_pages_alone_leave_nothing_to_measure_on(settings, tmp_path):
    with pytest.raises(HypenetError, match="all synthetic; add prose to data.sources or name data.heldout"):
        packs(tmp_path, "retrieval:50", "retrieval:20:seed=1", **settings)
    assert not (tmp_path / "train").exists()


def test_haystacks_and_choices_hold_no_page(documents_file, rows, tmp_path):
    """A page's facts would compete with the needle, and its random values are no continuation that can be told."""
    _, held = packs(tmp_path, str(documents_file), PAGES, heldout_share=0.3)
    prose = corpus.heldout_prose(held, TOKENIZER)
    assert prose and set(prose) <= set(rows)
    _, choices = probes(SelectConfig(questions=6, length=512, answer_budget=16), TOKENIZER, held, 0)
    for tokens, ids in zip(np.asarray(choices.tokens), np.asarray(choices.segment_ids), strict=True):
        assert set(TOKENIZER.decode(tokens[ids >= 0].tolist()).lower()) <= set("abcdefghijklmnopqrstuvwxyz .")
