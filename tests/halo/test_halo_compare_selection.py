"""`hypenet compare-selection` on the tiny teacher: whole, continued after a stop, refused, and what a page says."""

import json
import shutil

import numpy as np
import pytest

from hypenet_jax.cli import main
from hypenet_jax.evals import suite
from hypenet_jax.halo import compare_selection, variants
from hypenet_jax.halo.workdir import read_json

METHODS = ("halo", "jet-nemotron", "kl-ls", "kl-ls-restored", "evenly", "gate-search")
SETTINGS = (
    "select.gate.steps=3", "select.gate.batch_size=4", "select.gate.seq_len=64", "select.gate.gate_lr=0.5",
    "select.gate.retrieval=retrieval:40:max_chars=256", "compare.seeds=(0,1)", "compare.steps=3",
)  # fmt: skip


def command(config, directory, *changes, name="compare-selection"):
    sets = [word for setting in (*SETTINGS, *changes) for word in ("--set", setting)]
    return [name, "--config", str(config), "--workdir", str(directory), *sets]


def told(table):
    """The table without what the clock says."""
    return {
        key: [{k: v for k, v in row.items() if k != "seconds"} for row in value] if key != "teacher" else value
        for key, value in table.items()
        if key in ("methods", "choices", "students", "teacher")
    }


@pytest.fixture(scope="module")
def compared(tmp_path_factory, convert_config):
    """A work directory that `compare-selection` alone has made."""
    from hypenet_jax.halo import run

    directory = tmp_path_factory.mktemp("comparison") / "run"
    with pytest.MonkeyPatch.context() as patch:
        whole = run.make_mesh
        import jax

        patch.setattr(run, "make_mesh", lambda axes: whole(axes, jax.devices()[:1]))
        assert main(command(convert_config, directory)) == 0
    return directory


def test_every_method_and_seed_is_there(compared):
    table = read_json(compared / "selection" / "table.json")
    assert [row["method"] for row in table["methods"]] == list(METHODS)
    assert {(c["method"], c["seed"]) for c in table["choices"]} == {(m, s) for m in METHODS for s in (0, 1)}
    assert all(len(choice["layers"]) == 1 for choice in table["choices"])
    chosen = {tuple(choice["layers"]) for choice in table["choices"]}
    assert [tuple(student["layers"]) for student in table["students"]] == sorted(chosen)
    costs = {choice["method"]: choice["tokens"] for choice in table["choices"]}
    assert costs["evenly"] == 0 and costs["gate-search"] == 3 * 4 * 64
    # Teacher and two variants on 4 questions of 512 tokens; HALO's rule reads the 4 x 4 continuations as well.
    assert costs["jet-nemotron"] == costs["kl-ls"] == 3 * 4 * 512 and costs["kl-ls-restored"] == 2 * 4 * 512
    assert costs["halo"] == 3 * (4 * 512 + 16 * 119)
    for row in table["methods"]:
        assert row["accuracy"][0]["total"] == 2 and np.isfinite(row["perplexity"]) and 0 <= row["overlap"] <= 1
    assert not list((compared / "selection").rglob("checkpoints"))


def test_the_page(compared):
    page = (compared / "selection" / "index.html").read_text()
    for word in (*METHODS, "<svg", "Every distinct choice", "Wall time, gate search, seed 1"):
        assert word in page, word
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_again_nothing_is_computed(compared, convert_config, on_one_device, monkeypatch):
    before = read_json(compared / "selection" / "table.json")
    for name in ("train", "_evaluated"):
        monkeypatch.setattr(compare_selection, name, lambda *a, **k: pytest.fail("computed again"))
    assert main(command(convert_config, compared)) == 0
    assert told(read_json(compared / "selection" / "table.json")) == told(before)


def test_stopped_and_continued_it_is_the_same(compared, convert_config, tmp_path, on_one_device, monkeypatch):
    directory = tmp_path / "run"
    shutil.copytree(compared, directory)
    selection = directory / "selection"
    # What a kill after the first seed's search leaves, its second student half trained.
    for name in ("table.json", "gates-seed1.json", "teacher.json"):
        (selection / name).unlink()
    students = sorted((selection / "students").glob("*.json"))
    students[-1].unlink()
    shutil.rmtree(selection / "gate-search-seed1")
    shutil.rmtree(students[-1].with_suffix(""))
    evaluated = compare_selection._evaluated

    def stop(run, model, params, name):
        if name != "teacher":
            raise KeyboardInterrupt
        return evaluated(run, model, params, name)

    monkeypatch.setattr(compare_selection, "_evaluated", stop)
    assert main(command(convert_config, directory)) == 130
    assert (selection / "gates-seed1.json").is_file() and not students[-1].is_file()
    monkeypatch.setattr(compare_selection, "_evaluated", evaluated)
    assert main(command(convert_config, directory)) == 0
    assert told(read_json(selection / "table.json")) == told(read_json(compared / "selection" / "table.json"))


def test_kl_ls_restored_may_join(compared, convert_config, tmp_path, on_one_device, monkeypatch):
    """Probes that were made without it get its scores, and keep their own as they are."""
    directory = tmp_path / "run"
    shutil.copytree(compared, directory)
    whole = {}
    for path in (directory / "selection").glob("probes-seed*.json"):
        whole[path] = read_json(path)
        without = {key: value for key, value in whole[path].items() if key != "restored_kl"}
        without["costs"] = {key: value for key, value in without["costs"].items() if key != "restored_kl"}
        path.write_text(json.dumps(without))
    monkeypatch.setattr(variants, "measure", lambda *a, **k: pytest.fail("the other probes were made again"))
    assert main(command(convert_config, directory)) == 0
    assert len(whole) == 2
    for path, before in whole.items():
        now = read_json(path)
        assert now["restored_kl"] == before["restored_kl"] and now["kl"] == before["kl"]
        assert now["costs"].keys() == before["costs"].keys() and now["costs"]["kl"] == before["costs"]["kl"]
        assert now["costs"]["restored_kl"]["tokens"] == before["costs"]["restored_kl"]["tokens"]
    assert told(read_json(directory / "selection/table.json")) == told(read_json(compared / "selection/table.json"))


@pytest.mark.parametrize("at", ["probes", "student"])
def test_of_several_processes_all_stop_in_the_midst(
    compared, convert_config, tmp_path, on_one_device, monkeypatch, capsys, of_two_processes, at
):
    """SIGTERM while layers are restored one by one, and while a student answers: what was finished stays."""
    directory = shutil.copytree(compared, tmp_path / "run")
    selection, needles, recall_and_kl = directory / "selection", suite.needles, variants._recall_and_kl
    lost = selection / "probes-seed1.json" if at == "probes" else max((selection / "students").glob("*.json"))
    lost.unlink()
    counts = {"measured": 0, "needles": 0}

    def measured(*arguments):
        counts["measured"] += 1
        # After the teacher and both layers: the first of those that are restored.
        of_two_processes.asked = counts["measured"] == 4
        return recall_and_kl(*arguments)

    def asked(*arguments):
        counts["needles"] += 1
        of_two_processes.asked = True
        return needles(*arguments)

    monkeypatch.setattr(variants, "_recall_and_kl", measured)
    monkeypatch.setattr(suite, "needles", asked)
    with pytest.raises(SystemExit) as stopped:
        main(command(convert_config, directory))
    assert stopped.value.code == 75 and "stopped; the same command continues" in capsys.readouterr().err
    assert counts == ({"measured": 4, "needles": 0} if at == "probes" else {"measured": 0, "needles": 1})
    assert not lost.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["compare.steps=4"], "comparison of other settings: distill.steps was 3 and is 4"),
        (["compare.seeds=(0,0)"], "each once"),
        (["compare.seeds=(0,4294967296)"], "compare.seeds is (0, 4294967296); each must be at least 0 and below 2**32"),
        (["compare.methods=('best',)"], "compare.methods is 'best'"),
        (["compare.batch_size=0"], "compare.batch_size is 0"),
        (["compare.lengths=(100,)"], "'compare': length 100 is too short"),
        (["select.gate.temperature=0"], "gate.temperature is 0"),
        (["select.gate.trains=all"], "gate.trains is 'all'; use one of gates, mixers"),
        (["select.gate.retrieval_share=1.5"], "gate.retrieval_share is 1.5"),
        (["compare.methods=('latter-half',)", "select.keep=2"], "belongs to another run: select.keep"),
    ],
)
def test_what_is_refused(compared, convert_config, on_one_device, capsys, changes, words):
    assert main(command(convert_config, compared, *changes)) == 2
    said = capsys.readouterr().err
    assert words in said.splitlines()[-1] and said.count("hypenet: ") == 1


def test_select_by_the_gate_search(compared, convert_config, tmp_path, on_one_device):
    directory = tmp_path / "run"
    directory.mkdir()
    for name in ("data", "align"):
        shutil.copytree(compared / name, directory / name)
    config = read_json(compared / "config.json")
    config["select"]["method"] = "gate-search"
    (directory / "config.json").write_text(json.dumps(config))
    changes = ("select.method=gate-search", "select.gate.trains=mixers")
    config["select"]["gate"]["trains"] = "mixers"
    (directory / "config.json").write_text(json.dumps(config))
    assert main(command(convert_config, directory, *changes, name="select")) == 0
    found = read_json(directory / "select.json")
    assert found["method"] == "gate-search" and len(found["gate"]) == 2 and found["scores"] == found["gate"]
    assert found["layers"] == [int(np.argmax(found["gate"]))]
