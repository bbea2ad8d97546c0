"""An export appears whole or not at all, and never replaces what is not ours."""

import errno
import os
import shutil

import pytest
from hub_models import CONFIGS, assert_same_bits, random_params
from safetensors import SafetensorError

from hypenet_jax import hub
from hypenet_jax.errors import HypenetError
from hypenet_jax.hub import directory as directories
from hypenet_jax.hub import weights_out
from hypenet_jax.model import LanguageModel

MODEL, PARAMS = LanguageModel(config=CONFIGS["llama"]), random_params(CONFIGS["llama"])


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_previous_export_is_replaced(tmp_path):
    hub.save(MODEL, PARAMS, tmp_path / "out", max_shard_bytes=8000)
    other = random_params(CONFIGS["llama"], seed=1)
    hub.save(MODEL, other, tmp_path / "out")
    assert_same_bits(hub.load(tmp_path / "out")[1], other)
    assert not list((tmp_path / "out").glob("*index*"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_empty_and_new_directories(tmp_path):
    (tmp_path / "empty").mkdir()
    hub.save(MODEL, PARAMS, tmp_path / "empty")
    hub.save(MODEL, PARAMS, tmp_path / "new/deep")
    assert contents(tmp_path / "empty") == contents(tmp_path / "new/deep")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o777 & ~umask


def test_what_is_not_ours_stays(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    with pytest.raises(HypenetError, match=r"theirs holds config\.json"):
        hub.save(MODEL, PARAMS, theirs)
    (theirs / directories.MARKER).write_text('{"made_by": "somebody"}')
    with pytest.raises(HypenetError, match="no export of ours"):
        hub.save(MODEL, PARAMS, theirs)
    with pytest.raises(HypenetError, match="is a file"):
        hub.save(MODEL, PARAMS, theirs / "config.json")
    assert (theirs / "config.json").read_text() == "{}" and len(list(tmp_path.iterdir())) == 1


def test_a_file_added_to_an_export_stays(tmp_path):
    hub.save(MODEL, PARAMS, tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(HypenetError, match=r"holds notes\.txt"):
        hub.save(MODEL, random_params(CONFIGS["llama"], seed=1), tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_disk_that_fills_up_leaves_the_old_export(tmp_path, monkeypatch, error):
    hub.save(MODEL, PARAMS, tmp_path / "out")
    before = contents(tmp_path)
    write, calls = weights_out.save_file, []

    def second_shard_fails(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        write(*arguments)

    monkeypatch.setattr(weights_out, "save_file", second_shard_fails)
    with pytest.raises(HypenetError, match="disk of .* is full"):
        hub.save(MODEL, random_params(CONFIGS["llama"], seed=1), tmp_path / "out", max_shard_bytes=8000)
    assert contents(tmp_path) == before


def test_a_disk_that_is_too_small_is_named_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(HypenetError, match="0.0 MB free"):
        hub.save(MODEL, PARAMS, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_out, "save_file", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        hub.save(MODEL, PARAMS, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_fails_brings_the_old_export_back(tmp_path, monkeypatch):
    hub.save(MODEL, PARAMS, tmp_path / "out")
    before, rename = contents(tmp_path), os.rename

    def refuse_new(source, target):
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_new)
    with pytest.raises(HypenetError, match=r"cannot be written \(Input/output error\)"):
        hub.save(MODEL, random_params(CONFIGS["llama"], seed=1), tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_place_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(HypenetError, match="cannot be written"):
        hub.save(MODEL, PARAMS, tmp_path / "file/out")
