"""Model cards: what `save` knows, the license of what a model is made of, and cards that somebody has edited."""

import json
import shutil

import pytest
from hub_models import CONFIGS, random_params

from hypenet_jax import hub
from hypenet_jax.cli import main
from hypenet_jax.errors import HypenetError
from hypenet_jax.hub.card import CARD, Source, card, front_matter, is_ours, replace_card, sealed, source_of
from hypenet_jax.hub.directory import MARKER
from hypenet_jax.model import LanguageModel

NAME = "hypenet 1111"
MODEL, PARAMS = LanguageModel(config=CONFIGS[NAME]), random_params(CONFIGS[NAME])
APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"


@pytest.fixture
def export(tmp_path):
    hub.save(MODEL, PARAMS, tmp_path / "out", "bfloat16")
    return tmp_path / "out"


def test_save_alone_writes_what_it_knows(export):
    text = (export / CARD).read_text()
    assert is_ours(text) and CARD in json.loads((export / MARKER).read_text())["files"]
    front = front_matter(text)
    assert front == {"library_name": "hypenet_jax", "pipeline_tag": "text-generation"}
    assert "- hypenet\n" in text and "stored in bfloat16" in text and "softmax attention in layers 1 " in text
    assert f"vocabulary {CONFIGS[NAME].vocab_size}" in text
    for absent in ("license", "base_model", "Perplexity", "Needles", "Reproduce", "Training"):
        assert absent not in text
    assert hub.load(export)[0].config == CONFIGS[NAME]


def test_an_edited_card_stays(export):
    ours = (export / CARD).read_text()
    edited = ours.replace("## The network", "## My network")
    (export / CARD).write_text(edited)
    assert not is_ours(edited) and not replace_card(export, sealed("new\n"))
    hub.save(MODEL, PARAMS, export)
    assert (export / CARD).read_text() == edited
    (export / CARD).write_text(ours)
    assert replace_card(export, sealed("new\n")) and (export / CARD).read_text().startswith("new\n")
    hub.save(MODEL, PARAMS, export)
    assert "stored in float32" in (export / CARD).read_text()


def test_an_export_without_a_card_gets_one(export):
    """As versions before this one wrote them: the marker has to list the new file, or the next save refuses."""
    (export / CARD).unlink()
    marker = json.loads((export / MARKER).read_text())
    marker["files"].remove(CARD)
    (export / MARKER).write_text(json.dumps(marker))
    assert replace_card(export, sealed("new\n"))
    hub.save(MODEL, PARAMS, export)
    assert is_ours((export / CARD).read_text())
    assert [path.name for path in export.parent.iterdir()] == ["out"]


def test_what_is_not_ours_gets_no_card(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text("{}")
    with pytest.raises(HypenetError, match="no export of ours"):
        replace_card(tmp_path / "theirs", sealed("new\n"))
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["config.json"]


def test_a_card_that_cannot_be_written_leaves_the_old_one(export, monkeypatch):
    before = (export / CARD).read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(HypenetError, match="No space left"):
        replace_card(export, sealed("new\n"))
    assert (export / CARD).read_text() == before and [path.name for path in export.parent.iterdir()] == ["out"]


def test_a_teachers_license_and_name(tmp_path):
    place = tmp_path / "qwen3-tiny"
    place.mkdir()
    assert source_of(place) == source_of(f"{place}/") == Source("qwen3-tiny")
    (place / "LICENSE").write_text(APACHE)
    assert source_of(place).license == (("license", "apache-2.0"),)
    (place / CARD).write_text("---\nlicense: other\nlicense_name: mine\ntags:\n- x\n---\nlicense: none\n")
    (place / "config.json").write_text(json.dumps({"_name_or_path": "Qwen/Qwen3-Tiny"}))
    found = source_of(place)
    assert found == Source("qwen3-tiny", "Qwen/Qwen3-Tiny", (("license", "other"), ("license_name", "mine")))
    (place / "config.json").write_text(json.dumps({"_name_or_path": "/data/models/qwen"}))
    assert source_of(place).repository is None and source_of("nowhere/at-all") == Source("at-all")
    made = front_matter(card("Title", [], found, ["jax"]))
    assert (made["license"], made["license_name"], made["base_model"]) == ("other", "mine", "Qwen/Qwen3-Tiny")


def test_the_license_goes_through_import_and_what_comes_after(byte_teacher, tmp_path, capsys):
    shutil.copytree(byte_teacher, tmp_path / "teacher")
    (tmp_path / "teacher" / CARD).write_text("---\nlicense: cc-by-4.0\n---\n# Mine\n")
    assert main(["import", str(tmp_path / "teacher"), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    front = front_matter((tmp_path / "half" / CARD).read_text())
    assert (front["license"], front["base_model"]) == ("cc-by-4.0", "teacher")
    assert source_of(tmp_path / "half").license == (("license", "cc-by-4.0"),)


@pytest.mark.parametrize("text", ["", "# no front matter\nlicense: mit\n", "---\nlicense: mit\n", "--- \nx\n---"])
def test_no_front_matter(text):
    assert front_matter(text) == {}
