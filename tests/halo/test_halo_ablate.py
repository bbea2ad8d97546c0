"""`hypenet ablate` on the tiny conversion: cells that differ in one thing, kept, resumed, and drawn."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from hypenet_jax.cli import main
from hypenet_jax.config import load_config
from hypenet_jax.errors import HypenetError
from hypenet_jax.halo import ablate as module
from hypenet_jax.halo.run import open_run, start_student
from hypenet_jax.halo.settings import AblateConfig, ObjectiveConfig
from hypenet_jax.halo.studies import STUDIES, Study, Variant, check, stage_of, steps_of
from hypenet_jax.train.metrics import SilentReporter

pytestmark = pytest.mark.usefixtures("on_one_device")

SMALL = {"seeds": 2, "align_steps": 2, "distill_steps": 4, "measure_every": 2, "heldout_rows": 6}
STUDY = Study(
    "toy",
    "What differs?",
    (
        Variant("plain", "plain"),
        Variant("again", "the same again"),
        Variant("quarter", "one row in four", objective=ObjectiveConfig(kl_one_in=4)),
        Variant("rounded", "bfloat16 weights", weights="bfloat16", rates=(1e-5, 1e-5)),
        Variant("joined", "joined", documents="joined"),
    ),
)


def settings(**changes):
    return [word for k, v in (SMALL | changes).items() for word in ("--set", f"ablate.{k}={v}")]


@pytest.fixture
def base(finished, tmp_path):
    """A copy of the finished conversion."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def bench(base, convert_config):
    overrides = [f"ablate.{k}={v}" for k, v in SMALL.items()]
    return module.Bench(open_run(load_config(convert_config, overrides), base, SilentReporter()))


def test_what_cells_share_and_what_they_change(bench):
    cells = {v.name: bench.trained(STUDY, v, 0) for v in STUDY.variants}
    plain = cells["plain"]["distill"]
    assert [point["tokens"] for point in plain] == [0, 512, 1024]
    assert plain == cells["again"]["distill"], "the same recipe and seed must be the same to the bit"
    for name, cell in cells.items():
        if name == "rounded":
            assert cell["distill"][0] != plain[0], "its start is rounded too"
            assert cell["distill"][0]["kl"] == pytest.approx(plain[0]["kl"], rel=0.01)
        else:
            assert cell["distill"][0] == plain[0], "all start from one student"
        assert name in ("plain", "again") or cell["distill"][-1] != plain[-1], name
    assert plain[-1]["kl"] < plain[0]["kl"]
    # At 1e-5 weights in bfloat16 hardly move.
    assert abs(cells["rounded"]["distill"][-1]["kl"] / plain[0]["kl"] - 1) < 0.01
    # One program serves float32 cells, another bfloat16.
    assert len(bench._steps) == 2 and all(step._cache_size() == 1 for step in bench._steps.values())
    other = bench.trained(STUDY, STUDY.variants[0], 1)["distill"]
    assert other[0] == plain[0] and other[-1] != plain[-1], "another seed reads other text"


def test_the_held_out_measurement_is_the_loss(bench):
    """Against the pipeline's own loss on one batch of the held-out rows, padding rows left out."""
    from hypenet_jax.halo.distill import distillation_loss

    student, params = start_student(bench.run)
    stage = stage_of(bench.run.config, "distill", 4, STUDY.variants[0])
    measured = bench._measure("distill", params, stage)
    tokens, starts = bench.run.heldout.rows(np.arange(6) * 64, 65)
    ids = np.cumsum(starts, axis=1)[:, :-1].astype(np.int32)
    batch = {"tokens": tokens[:, :-1].astype(np.int32), "segment_ids": ids - ids[:, :1]}
    value, _ = jax.jit(distillation_loss(bench.run.teacher, student, None))(params, bench.frozen, batch)
    assert measured["kl"] == pytest.approx(float(value), rel=1e-5)


def test_studies_from_the_command_line(base, convert_config, capsys, monkeypatch):
    command = ["ablate", "--config", str(convert_config), "--workdir", str(base), "--study", "lengths", *settings()]
    directory = base / "studies" / "lengths"
    trained = module.Bench.trained

    def interrupted(self, study, variant, number):
        if variant.name == "quarter":
            raise KeyboardInterrupt
        return trained(self, study, variant, number)

    monkeypatch.setattr(module.Bench, "trained", interrupted)
    assert main(command) == 130
    kept = {path.name: path.read_bytes() for path in (directory / "cells").iterdir()}
    assert sorted(kept) == ["eighth-0.json", "none-0.json"]
    monkeypatch.setattr(module.Bench, "trained", trained)
    assert main(command) == 0
    assert all((directory / "cells" / name).read_bytes() == text for name, text in kept.items())
    found = json.loads((directory / "result.json").read_text())
    assert len(found["cells"]) == 8 and found["seeds"] == [0, 1] and found["versions"]["jax"]
    by_name = {row["name"]: row for row in found["summary"]}
    assert "mse" not in by_name["none"]["final"] and by_name["half"]["final"]["mse"]["low"] is not None
    assert by_name["eighth"]["difference"] == {} and by_name["none"]["difference"]["kl"]["mean"] != 0
    page = (directory / "index.html").read_text()
    assert "1/2 alignment" in page and "<svg" in page and "http" not in page.replace("http://www.w3.org", "")
    # Finished cells stay; a cell of other settings is run again, and it is said.
    monkeypatch.setattr(module.Bench, "trained", lambda *a: pytest.fail("trained again"))
    assert main(command) == 0
    capsys.readouterr()
    monkeypatch.setattr(module.Bench, "trained", interrupted)
    assert main([*command, "--set", "ablate.measure_every=1"]) == 130
    assert "eighth-0.json is of other settings and is run again" in capsys.readouterr().err


@pytest.mark.parametrize("within", ["_step", "_needles"])
def test_of_several_processes_all_stop_within_a_cell(
    base, convert_config, capsys, monkeypatch, of_two_processes, within
):
    """SIGTERM in the second cell, while it trains and while it answers: the first one stays."""
    works, calls = getattr(module.Bench, within), []

    def counted(*arguments):
        calls.append(arguments)
        of_two_processes.asked = len(calls) == 2
        return works(*arguments)

    monkeypatch.setattr(module.Bench, within, counted)
    few = settings(distill_steps=2, heldout_rows=2, needle_lengths="(512,)")
    command = ["ablate", "--config", str(convert_config), "--workdir", str(base), "--study", "documents", *few]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 75 and "stopped; the same command continues" in capsys.readouterr().err
    assert len(calls) == 2
    assert [cell.name for cell in (base / "studies" / "documents" / "cells").iterdir()] == ["masked-0.json"]


def test_every_study_is_well_made(convert_config):
    config = load_config(convert_config, ["ablate.batch_size=12"])
    for study in STUDIES.values():
        names = [v.name for v in study.variants]
        assert len(set(names)) == len(names) and study.question.endswith("?")
        assert sum(study.against(v) is None for v in study.variants) >= 1
        for variant in study.variants:
            other = study.against(variant)
            if other is not None:
                fields = [f for f in vars(variant) if getattr(variant, f) != getattr(other, f)]
                assert len(set(fields) - {"name", "label", "against"}) == 1, (variant.name, fields)
        check(study, config)
    assert steps_of(STUDIES["lengths"], STUDIES["lengths"].variants[3], AblateConfig(3, 40, 60)) == (50, 50)
    assert steps_of(STUDIES["kl"], STUDIES["kl"].variants[0], AblateConfig(3, 40, 60)) == (0, 60)
    held = stage_of(config, "distill", 10, STUDIES["masters"].variants[-1])
    slow = load_config(convert_config, ["ablate.peak_lr=2e-4"])
    for study, rates in ((STUDIES["kl"], (2e-4, 1e-6)), (STUDIES["masters"], (2e-4, 1e-6))):
        stage = stage_of(slow, "distill", 10, study.variants[0])
        assert (stage.peak_lr, stage.end_lr) == pytest.approx(rates)
    assert stage_of(slow, "distill", 10, STUDIES["masters"].variants[-1]).peak_lr == 1e-5
    assert (held.peak_lr, held.schedule, held.weights, held.batch_size) == (1e-5, "warmup_stable", "bfloat16", 12)


def test_mistakes_are_named(convert_config, base, capsys):
    with pytest.raises(HypenetError, match="ablate.seeds is 1; an interval needs at least 2"):
        AblateConfig(seeds=1)
    with pytest.raises(HypenetError, match="ablate.peak_lr is 0; it must be above 0"):
        AblateConfig(peak_lr=0.0)
    command = ["ablate", "--config", str(convert_config), "--workdir", str(base), "--study", "kl"]
    assert main(command) == 2
    assert "takes one row in 12 but a batch has 4; set ablate.batch_size to 12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"needle_lengths": "[512,100]"}, "in config section 'ablate': length 100 is too short"),
        ({"needle_lengths": "[512]", "needle_task": "S2"}, "nowhere"),
        ({"needle_lengths": "[512]", "needle_task": "S9"}, "S9"),
    ],
)
def test_needles_that_cannot_be_asked_are_refused_before_any_training(
    convert_config, base, capsys, monkeypatch, changes, words
):
    monkeypatch.setattr(module.pipeline, "align", lambda run: pytest.fail("trained"))
    command = ["ablate", "--config", str(convert_config), "--workdir", str(base), "--study", "documents"]
    assert main([*command, *settings(**changes), "--set", "evaluate.essays=nowhere"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("hypenet: in config section 'ablate': ") and words in said, said
    assert not (base / "studies").exists()


def test_cells_stay_when_only_what_is_written_changes(bench, tmp_path, monkeypatch):
    """A cell's numbers do not hang on how often a stage logs or saves, nor on its microbatches."""
    variant = STUDY.variants[0]
    monkeypatch.setattr(bench, "trained", lambda *_: {"align": [], "distill": [{"kl": 1.0, "nll": 1.0, "tokens": 4}]})
    first = module._cell(bench, STUDY, variant, 0, tmp_path)
    monkeypatch.setattr(bench, "trained", lambda *_: pytest.fail("trained again"))
    free = {"log_every": 7, "checkpoint_every": 9, "keep": 1, "token_chunk": 64, "gradient_accumulation": 2}
    stage = dataclasses.replace(bench.run.config.distill, **free)
    bench.run = dataclasses.replace(bench.run, config=dataclasses.replace(bench.run.config, distill=stage))
    assert module._cell(bench, STUDY, variant, 0, tmp_path) == first
    slower = dataclasses.replace(stage, b2=0.9)
    bench.run = dataclasses.replace(bench.run, config=dataclasses.replace(bench.run.config, distill=slower))
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        module._cell(bench, STUDY, variant, 0, tmp_path)
    (tmp_path / "plain-0.json").write_text("[]")
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        module._cell(bench, STUDY, variant, 0, tmp_path)
