"""Needles for a grid of a: the same questions, each answered as the model with that scaling answers them."""

import json
import shutil

import numpy as np
import pytest

import hypenet_jax as hn
from hypenet_jax.cli import main
from hypenet_jax.evals import niah
from hypenet_jax.evals.report_needles import needles_by_scale
from hypenet_jax.halo import scale_needles as module
from hypenet_jax.halo.settings import EvaluateConfig

SETTINGS = EvaluateConfig(
    tasks=("S1",), lengths=(512,), samples=4, answer_budget=16, scale_lengths=(512, 640), batch_tokens=1024
)


@pytest.fixture(scope="module")
def student(byte_teacher):
    model, params = hn.load(byte_teacher)
    student, params = hn.convert(model, params, [0, 1], start="calibrated")
    return student.with_logits_scaling(77.0), params


def test_a_traced_scaling_is_the_configs(student):
    model, params = student
    plain, tokens = model.with_logits_scaling(None), np.arange(60, dtype=np.int32).reshape(2, 30)
    for a, scaled in ((3.0, model.with_logits_scaling(3.0)), (module.UNSCALED, plain)):
        wanted = np.asarray(scaled.hidden(params, tokens))
        np.testing.assert_allclose(plain.hidden(params, tokens, hype_a=np.float32(a)), wanted, rtol=1e-6, atol=1e-6)
        stepped, _ = plain.step(params, tokens, plain.init_cache(2, 30), hype_a=np.float32(a))
        np.testing.assert_allclose(stepped, scaled.step(params, tokens, plain.init_cache(2, 30))[0], rtol=1e-6)
    assert np.abs(np.asarray(plain.hidden(params, tokens, hype_a=np.float32(2))) - wanted).max() > 1e-3


def test_rows_questions_and_resumption(student, tmp_path, monkeypatch):
    model, params = student
    path, said, asked, compiled = tmp_path / "needles.json", [], [], niah._answers_are_argmax._cache_size()

    def run(grid=(2.0, 200.0)):
        return module.scale_needles(
            path, model, params, model.tokenizer, SETTINGS, grid=grid, essays=["prose"], seed=0, report=said.append
        )

    score = niah.score_forced

    def watched(plain, params, samples, *arguments, **options):
        asked.append((options["hype_a"], tuple(s.prompt_ids for s in samples)))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return score(plain, params, samples, *arguments, **options)

    monkeypatch.setattr(niah, "score_forced", watched)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(json.loads(path.read_text())["rows"]) == 2
    found = run()
    assert [(row["a"], row["length"]) for row in found["rows"]] == [
        (a, length) for length in (512, 640) for a in (None, 2.0, 77.0, 200.0)
    ]
    assert all(row["total"] == 4 for row in found["rows"]) and len(said) == 8
    by_length: dict[int, set] = {}
    for _, prompts in asked:
        by_length.setdefault(len(prompts[0]), set()).add(prompts)
    assert all(len(prompts) == 1 for prompts in by_length.values()), "every a is asked the same"
    assert [a for a, _ in asked[:3]] == [module.UNSCALED, 2.0, 77.0]
    assert niah._answers_are_argmax._cache_size() - compiled == 2, "one program a length, whatever a"
    asked.clear()
    run((2.0, 9.0))
    assert [a for a, _ in asked] == [9.0, 9.0]


def test_the_figure():
    rows = [
        {"a": a, "task": task, "length": 512, "correct": 3, "total": 4}
        for a in (None, 10.0, 100.0)
        for task in ("S1", "S2")
    ]
    drawn = needles_by_scale({"rows": rows}, {"a": 31.6})
    assert drawn.startswith("<svg") and "a = 31.6" in drawn and "S2" in drawn
    assert needles_by_scale(None, {}) is None and needles_by_scale({"rows": []}, {}) is None


@pytest.mark.usefixtures("on_one_device")
def test_evaluate_asks_and_the_report_shows(finished, convert_config, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "eval.json").read_text()
    more = ["--set", "evaluate.scale_lengths=(512,)", "--set", "evaluate.scale_grid=(5.0,)"]
    assert main(["evaluate", "--config", str(convert_config), "--workdir", str(run), *more]) == 0
    assert "NIAH" not in capsys.readouterr().err and (run / "eval.json").read_text() == before
    rows = json.loads((run / "scale_needles.json").read_text())["rows"]
    fitted = json.loads((run / "fit_scale.json").read_text())["a"]
    assert {row["a"] for row in rows} == {None, 5.0, fitted} and {row["task"] for row in rows} == {"S1"}
    assert main(["report", str(run)]) == 0
    assert "Retrieval by a" in (run / "report" / "index.html").read_text()


@pytest.mark.usefixtures("on_one_device")
def test_of_several_processes_all_stop_after_a_row(finished, convert_config, tmp_path, of_two_processes, monkeypatch):
    run, score = shutil.copytree(finished, tmp_path / "run"), niah.score_forced

    def scored(*arguments, **options):
        of_two_processes.asked = True
        return score(*arguments, **options)

    monkeypatch.setattr(niah, "score_forced", scored)
    more = ["--set", "evaluate.scale_lengths=(512,)", "--set", "evaluate.scale_grid=(5.0,)"]
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--config", str(convert_config), "--workdir", str(run), *more])
    assert stopped.value.code == 75
    assert [row["a"] for row in json.loads((run / "scale_needles.json").read_text())["rows"]] == [None]
