import io
import json

import pytest
from toy_training import make_stage, run

from hypenet_jax.errors import HypenetError
from hypenet_jax.train.metrics import Reporter, SilentReporter, drop_lines_after


class Terminal(io.StringIO):
    def isatty(self):
        return True


def record(step, **more):
    return {"step": step, "loss": 2.5, "tokens": step * 100, "seconds": 1.0, "tokens_per_second": 50.0} | more


def test_lines_past_the_restored_step_and_a_torn_one_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in (1, 2, 4, 6)) + '{"step": 8, "lo')
    with Reporter(tensorboard=False, stream=io.StringIO()).open("toy", str(tmp_path), 10, 4) as reporter:
        reporter.log(record(6, loss=1.5))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 2.5), (2, 2.5), (4, 2.5), (6, 1.5)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_that_is_not_ours_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("hello\nworld\n")
    with pytest.raises(HypenetError, match="line 1 is not a metrics line"):
        drop_lines_after(str(path), 0)
    assert path.read_text() == "hello\nworld\n"


def test_plain_lines_away_from_a_terminal(tmp_path):
    out = io.StringIO()
    with Reporter(tensorboard=False, stream=out).open("align", str(tmp_path), 10, 0) as reporter:
        reporter.log(record(5))
        reporter.message("a word")
    assert out.getvalue() == "align  step 5/10  loss 2.5000  50 tokens/s  0:00:10 left\na word\n"


def test_a_line_without_a_loss(tmp_path):
    out = io.StringIO()
    unlearned = {key: value for key, value in record(5).items() if key != "loss"} | {"count": 0.0}
    with Reporter(tensorboard=False, stream=out).open("finetune", str(tmp_path), 10, 0) as reporter:
        reporter.log(unlearned)
    assert out.getvalue() == "finetune  step 5/10  no token to learn  50 tokens/s  0:00:10 left\n"


def test_a_bar_on_a_terminal(tmp_path):
    out = Terminal()
    with Reporter(tensorboard=False, stream=out).open("align", str(tmp_path), 10, 0) as reporter:
        reporter.log(record(5))
    assert "align" in out.getvalue() and "5/10" in out.getvalue() and "loss 2.5000" in out.getvalue()


def test_one_reporter_serves_several_stages_and_writes_events(tmp_path):
    reporter = Reporter(stream=io.StringIO())
    for name in ("align", "distill"):
        run(tmp_path / name, make_stage(steps=2, warmup_steps=1), name=name, reporter=reporter)
        names = [path.name for path in (tmp_path / name).iterdir()]
        assert "metrics.jsonl" in names and any(n.startswith("events.out.tfevents") for n in names)
    events = next(path for path in (tmp_path / "distill").iterdir() if "tfevents" in path.name).read_bytes()
    assert b"distill/loss" in events and b"align/loss" not in events


def test_the_silent_reporter_keeps_records(tmp_path):
    silent = SilentReporter()
    run(tmp_path, make_stage(steps=4, warmup_steps=1), reporter=silent)
    assert [line["step"] for line in silent.records] == [1, 2, 4]
    assert not (tmp_path / "metrics.jsonl").exists()
