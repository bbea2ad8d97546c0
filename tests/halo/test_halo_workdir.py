"""A work directory belongs to one config, and never takes what is somebody else's."""

import dataclasses
import json

import pytest

from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.settings import ConvertConfig, DataConfig, EvaluateConfig, FitScaleConfig
from hypenet_jax.halo.workdir import claim, made_by, read_json, timed, write_json
from hypenet_jax.train.stage import StageConfig

STAGE = StageConfig(steps=100, batch_size=8, seq_len=64, peak_lr=1e-3, end_lr=1e-5)
CONFIG = ConvertConfig("teacher", DataConfig(("stdlib",)), align=STAGE, distill=STAGE, finetune=STAGE)


def refused(directory, config, words, contents):
    before = contents(directory) if directory.is_dir() else directory.read_bytes()
    with pytest.raises(HypenetError, match=words):
        claim(directory, config)
    assert (contents(directory) if directory.is_dir() else directory.read_bytes()) == before


def test_a_new_and_an_empty_directory(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/below"):
        assert claim(tmp_path / name, CONFIG) == tmp_path / name
        assert json.loads((tmp_path / name / "config.json").read_text())["align"]["steps"] == 100
        claim(tmp_path / name, CONFIG)


def test_somebody_elses_directory(tmp_path, contents):
    (tmp_path / "notes.txt").write_text("mine")
    refused(tmp_path, CONFIG, "holds something else", contents)
    refused(tmp_path / "notes.txt", CONFIG, "is a file", contents)


@pytest.mark.parametrize("text", ['{"model_type": "qwen3"}', "[]", "3", '{"data": 3}'])
def test_somebody_elses_config_json(tmp_path, contents, text):
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, CONFIG, "holds something else", contents)


def test_another_run_is_named_by_its_first_difference(tmp_path, contents):
    claim(tmp_path, CONFIG)
    (tmp_path / "align").mkdir()
    other = dataclasses.replace(CONFIG, distill=dataclasses.replace(STAGE, peak_lr=2e-3), seed=7)
    refused(tmp_path, other, r"belongs to another run: distill\.peak_lr was 0\.001 and is 0\.002; choose", contents)


def test_what_is_free_to_change(tmp_path):
    claim(tmp_path, CONFIG)
    (tmp_path / "align").mkdir()
    free = dataclasses.replace(
        CONFIG,
        data=dataclasses.replace(CONFIG.data, workers=3),
        evaluate=EvaluateConfig(samples=3),
        mesh={"fsdp": 4},
        remat=False,
        distill=dataclasses.replace(STAGE, log_every=1, checkpoint_every=7, token_chunk=512, gradient_accumulation=2),
    )
    claim(tmp_path, free)
    assert json.loads((tmp_path / "config.json").read_text())["distill"]["checkpoint_every"] == 7


def test_before_the_first_step_everything_may_change(tmp_path):
    claim(tmp_path, CONFIG)
    (tmp_path / "data").mkdir()
    claim(tmp_path, dataclasses.replace(CONFIG, seed=7))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 7


def test_what_a_step_reads_may_change_until_it_has_begun(tmp_path, contents):
    claim(tmp_path, CONFIG)
    for name in ("align", "distill"):
        (tmp_path / name).mkdir()
    longer = dataclasses.replace(CONFIG, finetune=dataclasses.replace(STAGE, seq_len=128))
    chats = dataclasses.replace(longer, finetune_loss="completions", finetune_sources=("chats.jsonl",))
    for config in (longer, chats):
        claim(tmp_path, config)
        assert read_json(tmp_path / "config.json")["finetune"]["seq_len"] == 128
    earlier = dataclasses.replace(chats, distill=dataclasses.replace(STAGE, steps=70))
    refused(tmp_path, earlier, "another run: distill.steps was 100 and is 70", contents)
    (tmp_path / "finetune").mkdir()
    refused(tmp_path, CONFIG, "another run: finetune.seq_len was 128 and is 64", contents)
    refused(tmp_path, longer, "another run: finetune_loss was completions and is all", contents)
    shorter = dataclasses.replace(chats, fit_scale=FitScaleConfig(length=64))
    claim(tmp_path, shorter)
    (tmp_path / "fit_scale.json").write_text("{}")
    refused(tmp_path, chats, "another run: fit_scale.length was 64", contents)


def test_a_kill_while_the_config_was_written(tmp_path):
    (tmp_path / "config.json.tmp").write_text('{"tea')
    claim(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_results_are_read_or_explained(tmp_path):
    write_json(tmp_path / "deep" / "value.json", {"a": [1.5, None]})
    assert read_json(tmp_path / "deep" / "value.json") == {"a": [1.5, None]}
    with pytest.raises(HypenetError, match=r"select\.json is missing; run `hypenet select` first"):
        read_json(tmp_path / "select.json")
    with pytest.raises(HypenetError, match=r"other\.json is missing; run the step that writes it first"):
        read_json(tmp_path / "other.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(HypenetError, match=r"half\.json is not valid JSON"):
        read_json(tmp_path / "half.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(HypenetError, match="cannot be written"):
        write_json(tmp_path / "file" / "value.json", 1)


def test_seconds_add_up_over_runs(tmp_path):
    for _ in range(2):
        with timed(tmp_path, "align"):
            pass
    with pytest.raises(ValueError), timed(tmp_path, "distill"):
        raise ValueError
    run = read_json(tmp_path / "run.json")
    assert run["seconds"].keys() == {"align"} and "jax" in run["versions"]


def test_a_bucket_is_no_work_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HypenetError, match="gs://bucket/run, a bucket.*gcsfuse bucket"):
        claim("gs://bucket/run", CONFIG)
    assert not list(tmp_path.iterdir())


def test_a_run_of_an_earlier_version_goes_on(tmp_path, contents):
    claim(tmp_path, CONFIG)
    (tmp_path / "align").mkdir()
    before = read_json(tmp_path / "config.json")
    del before["objective"], before["ablate"], before["distill"]["weights"], before["data"]["documents"]
    (tmp_path / "config.json").write_text(json.dumps(before))
    rounded = dataclasses.replace(CONFIG, distill=dataclasses.replace(STAGE, weights="bfloat16"))
    refused(tmp_path, rounded, r"distill\.weights was float32 and is bfloat16", contents)
    claim(tmp_path, CONFIG)


def test_the_command_can_be_pasted(monkeypatch):
    """However the program was started: as a script, or as the module that its path ends in."""
    monkeypatch.setattr("sys.argv", ["/somewhere/hypenet_jax/cli.py", "convert", "--set", "seeds=(0, 1)"])
    assert made_by()["command"] == "hypenet convert --set 'seeds=(0, 1)'"
