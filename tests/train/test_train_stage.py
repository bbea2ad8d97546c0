import dataclasses

import pytest
from toy_training import make_stage

from hypenet_jax.errors import HypenetError
from hypenet_jax.train.stage import StageConfig, check_resumable


def test_the_defaults_are_halos():
    stage = StageConfig(steps=20000, batch_size=96, seq_len=512, peak_lr=1e-4, end_lr=1e-5)
    assert (stage.b1, stage.b2, stage.eps, stage.weight_decay, stage.clip_norm) == (0.9, 0.95, 1e-8, 0.0, 1.0)
    assert (stage.warmup_steps, stage.schedule, stage.tokens_per_step) == (50, "cosine", 49152)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, ["steps", "0"]),
        ({"batch_size": 2.5}, ["batch_size", "2.5"]),
        ({"peak_lr": float("nan")}, ["peak_lr", "nan"]),
        ({"peak_lr": "1e-4"}, ["peak_lr", "'1e-4'"]),
        ({"end_lr": -1.0}, ["end_lr", "-1.0"]),
        ({"end_lr": 0.5}, ["end_lr", "0.5", "peak_lr"]),
        ({"b2": 1.0}, ["b2", "1.0"]),
        ({"clip_norm": 0}, ["clip_norm", "0"]),
        ({"schedule": "linear"}, ["'linear'", "cosine"]),
        ({"warmup_steps": 12}, ["warmup_steps", "12 steps"]),
        ({"gradient_accumulation": 3}, ["batch_size", "gradient_accumulation 3"]),
        ({"keep": True}, ["keep", "True"]),
        ({"weights": "float16"}, ["weights", "'float16'", "bfloat16"]),
    ],
)
def test_mistakes_name_field_and_value(changes, words):
    with pytest.raises(HypenetError) as caught:
        make_stage(**changes)
    for word in words:
        assert word in str(caught.value)


def test_what_a_resumed_run_may_change():
    saved = dataclasses.asdict(make_stage())
    check_resumable(saved, make_stage(log_every=1, checkpoint_every=1, keep=5, gradient_accumulation=2), "here")
    with pytest.raises(HypenetError, match="peak_lr is 0.02 but the checkpoints in here were trained with 0.01"):
        check_resumable(saved, make_stage(peak_lr=0.02), "here")
    with pytest.raises(HypenetError, match="steps is 24"):
        check_resumable(saved, make_stage(steps=24), "here")
    constant = dataclasses.asdict(make_stage(schedule="constant"))
    check_resumable(constant, make_stage(schedule="constant", steps=24), "here")


def test_a_field_that_is_newer_than_the_checkpoint():
    saved = {k: v for k, v in dataclasses.asdict(make_stage()).items() if k != "weights"}
    check_resumable(saved, make_stage(), "here")
    with pytest.raises(HypenetError, match="weights is 'bfloat16' but the checkpoints in here .* 'float32'"):
        check_resumable(saved, make_stage(weights="bfloat16"), "here")
