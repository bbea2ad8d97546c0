"""`hypenet convert` from a teacher to its report, again, and step by step: bit for bit the same."""

import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

import hypenet_jax as hn
from hypenet_jax.cli import main
from hypenet_jax.config import load_config
from hypenet_jax.evals import suite
from hypenet_jax.halo import fit_scale, pipeline, run, variants
from hypenet_jax.halo.workdir import read_json
from hypenet_jax.hub import weights_out
from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.train.metrics import Reporter
from hypenet_jax.train.preemption import EXIT_PREEMPTED

STEPS = ("align", "select", "distill", "finetune", "fit-scale", "export", "evaluate")
STAGES = ("align", "distill", "finetune")

pytestmark = pytest.mark.usefixtures("on_one_device")


def test_everything_is_there(finished, stage_records):
    chosen = read_json(finished / "select.json")
    assert chosen["method"] == "kl-ls" and len(chosen["layers"]) == 1
    assert chosen["scores"] == chosen["kl"] and len(chosen["recall"]) == len(chosen["csr"]) == 2
    assert chosen["layers"] == [int(np.argmax(chosen["kl"]))]
    assert [len(stage_records(finished / stage)) for stage in STAGES] == [5, 5, 4]
    fitted = read_json(finished / "fit_scale.json")
    assert fitted["documents"] == 3 and fitted["grid"] == [2, 20, 200]
    found = read_json(finished / "eval.json")
    assert list(found["models"]) == ["teacher", "student", "student_unscaled"]
    assert [sample["model"] for sample in found["samples"]] == ["teacher", "student"]
    for model in found["models"].values():
        assert sum(row["total"] for row in model["niah"]) == 2
    assert "<html" in (finished / "report" / "index.html").read_text()
    assert read_json(finished / "run.json")["seconds"].keys() >= {"align", "select", "distill", "evaluate teacher"}


def test_training_makes_the_loss_fall(finished, stage_records):
    for stage in ("align", "distill"):
        records = stage_records(finished / stage)
        assert records[-1]["loss"] < records[0]["loss"]


def test_the_export_loads_and_computes_the_same(finished):
    model, params = hn.load(finished / "export")
    stage, trained = hn.load(finished / "finetune")
    layers = read_json(finished / "select.json")["layers"]
    assert model.config.attention_layers == tuple(layers) and model.tokenizer.vocab_size == 257
    a = read_json(finished / "fit_scale.json")["a"]
    assert model.config.logits_scaling.value == a
    tokens = np.arange(40, dtype=np.int32).reshape(2, 20)
    got, wanted = model.logits(params, tokens), stage.with_logits_scaling(a).logits(trained, tokens)
    np.testing.assert_array_equal(got, wanted)
    unscaled = model.with_logits_scaling(None).logits(params, tokens)
    np.testing.assert_array_equal(unscaled, stage.logits(trained, tokens))
    assert np.abs(np.asarray(got) - np.asarray(unscaled)).max() > 0


def test_generate_from_the_export_and_not_from_the_run(finished, capsys):
    assert main(["generate", str(finished / "export"), "--prompt", "One of", "--max-new-tokens", "5"]) == 0
    capsys.readouterr()
    assert main(["generate", str(finished), "--prompt", "One of"]) == 2
    assert f"is the work directory of a run; give its model, {finished / 'export'}" in capsys.readouterr().err


def test_again_nothing_is_trained(finished, convert_config, contents, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "_scores", lambda run, method: pytest.fail("measured again"))
    before = contents(finished)
    assert main(["convert", "--config", str(convert_config), "--workdir", str(finished)]) == 0
    said = capsys.readouterr().err
    assert "step 1/" not in said and "NIAH" not in said and "the report is" in said
    after = contents(finished)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"run.json", "report/index.html", "report/report.json"}


def test_step_by_step_is_the_same_to_the_bit(finished, convert_config, tmp_path, exported, stage_records):
    for step in STEPS:
        assert main([step, "--config", str(convert_config), "--workdir", str(tmp_path / "run")]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    assert exported(tmp_path / "run") == exported(finished)
    for name in ("select.json", "fit_scale.json", "eval.json"):
        assert read_json(tmp_path / "run" / name) == read_json(finished / name), name
    for stage in STAGES:
        assert stage_records(tmp_path / "run" / stage) == stage_records(finished / stage)
    assert os.path.isfile(tmp_path / "run" / "report" / "report.json")


@pytest.mark.parametrize(("step", "missing"), [("select", "align"), ("fit-scale", "select"), ("export", "fit_scale")])
def test_a_step_before_its_time(convert_config, tmp_path, capsys, step, missing):
    assert main([step, "--config", str(convert_config), "--workdir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert missing in said.splitlines()[-1] and "run" in said.splitlines()[-1]


def test_another_config_is_refused_by_name(finished, convert_config, contents, capsys):
    before = contents(finished)
    arguments = ["align", "--config", str(convert_config), "--workdir", str(finished)]
    assert main([*arguments, "--set", "align.peak_lr=0.5"]) == 2
    assert "belongs to another run: align.peak_lr was 0.003 and is 0.5" in capsys.readouterr().err
    assert main([*arguments, "--set", "student.position=nope", "--set", "seed=3"]) == 2
    assert "seed was 0 and is 3" in capsys.readouterr().err
    assert contents(finished) == before


def test_given_layers_need_no_measurement(convert_config, tmp_path, monkeypatch, finished):
    """A table of scores, a rule without scores, and layers by hand: each ends in select.json."""
    monkeypatch.setattr(pipeline, "_scores", lambda run, method: pytest.fail("measured"))
    table = tmp_path / "scores.json"
    rows = [{"layer": i, "csr": 0.5, "recall": 0.1 * i} for i in range(2)]
    table.write_text(json.dumps({"layers": rows}))
    cases = {
        "given": (["student.attention_layers=[1,0,1]"], [0, 1]),
        "jet-nemotron": (["select.method=jet-nemotron", f"select.scores={table}"], [0]),
        "evenly": (["select.method=evenly"], [1]),
        "none": (["select.method=none"], []),
    }
    for name, (settings, layers) in cases.items():
        flags = [word for setting in settings for word in ("--set", setting)]
        directory = tmp_path / name
        assert main(["select", "--config", str(convert_config), "--workdir", str(directory), *flags]) == 0
        found = read_json(directory / "select.json")
        assert (found["method"], found["layers"]) == (name, layers)


def test_new_measurements_of_a_finished_run(finished, convert_config, tmp_path, contents):
    """`evaluate` may change; what was trained stays."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    flags = ["--set", "evaluate.lengths=[480]", "--set", "evaluate.samples=1", "--set", "evaluate.prompts=[]"]
    assert main(["evaluate", "--config", str(convert_config), "--workdir", str(copy), *flags]) == 0
    found = read_json(copy / "eval.json")
    assert {row["length"] for model in found["models"].values() for row in model["niah"]} == {480}
    assert found["samples"] == []
    assert contents(copy / "finetune") == contents(finished / "finetune")


def test_a_finished_run_may_be_asked_needles_of_another_seed(finished, convert_config, tmp_path, monkeypatch):
    copy, seeds = tmp_path / "run", []
    shutil.copytree(finished, copy)

    def measured(*_arguments, seed, **_options):
        seeds.append(seed)
        return {"niah": []}

    monkeypatch.setattr(suite, "evaluate_model", measured)
    command = ["evaluate", "--config", str(convert_config), "--workdir", str(copy), "--set", "evaluate.prompts=[]"]
    own = load_config(convert_config).seed
    for flags, asked in ((["--set", "evaluate.seed=987654"], 987654), ([], own), (["--set", "evaluate.seed=5"], 5)):
        for again in (False, True):
            seeds.clear()
            assert main([*command, *flags]) == 0
            assert seeds == ([] if again else [asked] * 3)
    assert "seed" not in read_json(finished / "eval.json")["settings"]  # as files were before it could be set
    assert main([*command, "--set", "evaluate.seed=-1"]) == 2


def test_other_models_are_measured_beside_the_run_s_own(finished, convert_config, tmp_path, monkeypatch):
    """An export scores as the student does; it is asked once, and again when its weights are others."""
    copy, other, measure, asked = tmp_path / "run", tmp_path / "other", suite.evaluate_model, []
    shutil.copytree(finished, copy)
    shutil.copytree(finished / "export", other)
    monkeypatch.setattr(suite, "evaluate_model", lambda *a, **k: asked.append(a[0].config.family) or measure(*a, **k))
    command = ["evaluate", "--config", str(convert_config), "--workdir", str(copy), "--model", f"again={other}"]
    assert main(command) == 0
    models = read_json(copy / "eval.json")["models"]
    assert models["again"]["from"] == str(other) and models["again"]["niah"] == models["student"]["niah"]
    assert models["again"]["perplexity"] == pytest.approx(models["student"]["perplexity"], rel=1e-6)
    assert asked == ["hypenet"]
    assert main(command) == 0 and main(command[:-2]) == 0 and asked == ["hypenet"]
    teacher = read_json(copy / "config.json")["teacher"]
    assert main([*command[:-1], f"again={teacher}"]) == 0 and asked == ["hypenet", "qwen3"]
    found = read_json(copy / "eval.json")
    assert found["models"]["again"]["niah"] == found["models"]["teacher"]["niah"]
    assert [sample["model"] for sample in found["samples"]] == ["teacher", "student", "again"]
    assert main(["report", str(copy)]) == 0
    assert ">again<" in (copy / "report/index.html").read_text()
    assert "again" not in (copy / "export/README.md").read_text()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("run", "is the work directory of a run; give its model, {run}/export"),
        ("bare", "is the work directory of a run that has no model yet; run `hypenet export`"),
        ("run/align", "lacks the parameter"),
        ("run/distill", None),
        ("cut", "lacks the tensor"),
        ("other", "has another tokenizer than the run's teacher"),
    ],
)
def test_what_is_no_model_is_refused_before_anything_is_measured(
    finished, convert_config, tmp_path, place, words, monkeypatch, capsys
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "eval.json").unlink()
    (tmp_path / "bare").mkdir()
    shutil.copy(finished / "config.json", tmp_path / "bare")
    for name in ("cut", "other"):
        shutil.copytree(finished / "export", tmp_path / name)
    config = read_json(tmp_path / "cut" / "config.json")
    config |= {"num_hidden_layers": 3, "mixer_types": [*config["mixer_types"], config["mixer_types"][0]]}
    (tmp_path / "cut" / "config.json").write_text(json.dumps(config))
    tokenizer = read_json(tmp_path / "other" / "tokenizer.json")
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))

    def measured(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "evaluate_model", measured)
    command = ["evaluate", "--config", str(convert_config), "--workdir", str(run)]
    assert main([*command, "--model", f"more={tmp_path / place}"]) == (130 if words is None else 2)
    said = capsys.readouterr().err.splitlines()[-1]
    assert (words or "interrupted").format(run=run) in said


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("teacher=export", "is called 'teacher', a name of the run's own"),
        ("export", "--model is 'export'; write NAME=DIRECTORY"),
        ("a b=export", "--model is 'a b=export'; write NAME=DIRECTORY"),
        ("mine=nowhere", "nowhere"),
    ],
)
def test_other_models_that_cannot_be_measured(finished, convert_config, given, words, capsys, contents):
    before = contents(finished)
    assert main(["evaluate", "--config", str(convert_config), "--workdir", str(finished), "--model", given]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert contents(finished) == before


def test_another_vocabulary_is_refused(finished, convert_config, tmp_path, tiny, capsys):
    model, params = tiny
    hn.save(model, params, tmp_path / "other")
    command = ["evaluate", "--config", str(convert_config), "--workdir", str(finished)]
    assert main([*command, "--model", f"other={tmp_path / 'other'}"]) == 2
    assert f"has a vocabulary of {model.config.vocab_size:,}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "module", "function", "product"),
    [
        ("select", variants, "choice", "select.json"),
        ("fit-scale", fit_scale, "padded_rows", "fit_scale.json"),
        ("export", weights_out, "_converted", "export/model.safetensors"),
        ("evaluate", suite, "write_samples", "eval.json"),
    ],
)
def test_sigterm_outside_training_ends_with_75_and_leaves_nothing_half_done(
    finished, convert_config, tmp_path, monkeypatch, contents, capfd, command, module, function, product
):
    """A launcher starts again what ends with 75; what was not trained is done again from its beginning."""
    copy, works, left = tmp_path / "run", getattr(module, function), [True]
    unwanted = {product.partition("/")[0], "report"}
    shutil.copytree(finished, copy, ignore=lambda _, names: {*names} & unwanted)

    def terminated(*arguments, **options):
        if left:
            left.pop()
            os.kill(os.getpid(), signal.SIGTERM)
        return works(*arguments, **options)

    monkeypatch.setattr(module, function, terminated)
    line = [command, "--config", str(convert_config), "--workdir", str(copy)]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        main(line)
    assert stopped.value.code == EXIT_PREEMPTED and signal.getsignal(signal.SIGTERM) is before
    assert "the same command continues" in capfd.readouterr().err
    assert not (copy / product).exists() or read_json(copy / product)["models"] == {}
    assert not [path for path in copy.rglob("*") if path.name.endswith((".tmp", ".partial"))]
    assert main(line) == 0
    assert contents(copy)[product] == contents(finished)[product]


@pytest.mark.parametrize(
    ("command", "product"),
    [
        ("select", "select.json"),
        ("fit-scale", "fit_scale.json"),
        ("export", "export"),
        ("cache-teacher", "teacher_output/meta.json"),
    ],
)
def test_of_several_processes_all_stop_at_the_same_place(
    finished, convert_config, tmp_path, of_two_processes, capfd, command, product
):
    copy, of_two_processes.asked = tmp_path / "run", True
    shutil.copytree(finished, copy, ignore=lambda _, names: {*names} & {product, "report"})
    with pytest.raises(SystemExit) as stopped:
        main([command, "--config", str(convert_config), "--workdir", str(copy)])
    assert stopped.value.code == EXIT_PREEMPTED and "stopped; the same command continues" in capfd.readouterr().err
    assert not (copy / product).exists()


def test_what_was_killed_half_written_is_removed_by_the_next(finished, convert_config, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "data/train")
    lefts = [copy / ".export.0123abcd.partial", copy / ".export.0123abcd.previous", copy / "data/.train.partial-x1"]
    for left in lefts:
        left.mkdir()
    assert main(["export", "--config", str(convert_config), "--workdir", str(copy)]) == 0
    assert (copy / "data/train").is_dir() and not any(left.exists() for left in lefts)


def test_an_evaluation_that_is_stopped_goes_on_with_the_next_cell(finished, convert_config, tmp_path, monkeypatch):
    """SIGTERM in the second of three cells: that cell is finished and kept, the exit code says to go on."""
    copy, needles, asked = tmp_path / "run", suite.needles, []
    shutil.copytree(finished, copy)
    seconds = read_json(copy / "run.json")["seconds"]["evaluate teacher"]

    def counted(*arguments):
        asked.append((arguments[0].config.family, arguments[5]))
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return needles(*arguments)

    monkeypatch.setattr(suite, "needles", counted)
    settings = ("lengths=[500, 512, 520]", "row_tokens=1040", "prompts=[]")
    flags = [word for setting in settings for word in ("--set", f"evaluate.{setting}")]
    command = ["evaluate", "--config", str(convert_config), "--workdir", str(copy), *flags]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == EXIT_PREEMPTED
    assert asked == [("qwen3", 500), ("qwen3", 512)]
    found = read_json(copy / "eval.json")
    assert found["models"] == {} and found["begun"]["teacher"]["cells"] == [["S1", 500], ["S1", 512]]
    assert read_json(copy / "run.json")["seconds"]["evaluate teacher"] > seconds
    assert main(command) == 0
    assert asked[2:] == [("qwen3", 520), *(("hypenet", length) for length in (500, 512, 520) * 2)]
    found = read_json(copy / "eval.json")
    assert "begun" not in found and list(found["models"]) == ["teacher", "student", "student_unscaled"]
    for model in found["models"].values():
        assert [row["length"] for row in model["niah"]] == [500, 512, 520]
        assert set(model) == {"perplexity", "perplexity_by_position", "niah"}


def test_a_run_goes_on_with_other_devices(finished, convert_config, tmp_path, stage_records, monkeypatch):
    """Aligned on one device, distilled over four, which is what a config without a mesh means where there are four."""
    asked = []
    monkeypatch.setattr(run, "make_mesh", lambda axes: asked.append(axes) or make_mesh(axes, jax.devices()[:4]))
    copy = tmp_path / "run"
    shutil.copytree(finished, copy, ignore=lambda _, names: {*names} & {"distill", "finetune", "export", "eval.json"})
    assert main(["distill", "--config", str(convert_config), "--workdir", str(copy)]) == 0
    assert asked == [None]
    for got, wanted in zip(stage_records(copy / "distill"), stage_records(finished / "distill"), strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-3)


def test_the_workers_may_change_between_steps_and_not_within_one(
    finished, convert_config, tmp_path, stage_records, monkeypatch, contents, capfd
):
    copy, log = tmp_path / "run", Reporter.log
    later = {"distill", "finetune", "fit_scale.json", "export", "eval.json", "report"}
    shutil.copytree(finished, copy, ignore=lambda _, names: {*names} & later)
    command = ["distill", "--config", str(convert_config), "--workdir", str(copy)]

    def stop_at_two(self, record):
        log(self, record)
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Reporter, "log", stop_at_two)
        main([*command, "--set", "data.workers=1"])
    before = contents(copy / "distill")
    capfd.readouterr()
    assert main(command) == 2
    said = capfd.readouterr().err.splitlines()
    assert said[-1].endswith("has workers 1 but this run has 0; resume with the same, or start anew"), said
    assert contents(copy / "distill") == before
    assert main([*command, "--set", "data.workers=1"]) == 0
    assert stage_records(copy / "distill") == stage_records(finished / "distill")


def test_the_workdir_stays_where_it_was_put(finished):
    assert sorted(path.name for path in pathlib.Path(finished).parent.iterdir()) == ["run"]
    leftovers = [path for path in finished.rglob("*") if "partial" in path.name or path.name.endswith(".tmp")]
    assert leftovers == []
