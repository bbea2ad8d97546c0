"""A checkpoint of ours, loaded like any other model."""

import pytest
from hub_models import CONFIGS, assert_same_bits, random_params

from hypenet_jax import hub
from hypenet_jax.errors import HypenetError
from hypenet_jax.model import LanguageModel
from hypenet_jax.model.serialize import config_to_dict
from hypenet_jax.train.checkpoint import Checkpoints


@pytest.fixture
def stage(tmp_path):
    config = CONFIGS["hypenet 1111"]
    with Checkpoints(tmp_path / "distill") as checkpoints:
        checkpoints.save(7, {"params": random_params(config), "step": 7}, {"model": config_to_dict(config)})
    return tmp_path / "distill"


@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_load_and_export(stage, tmp_path, below):
    config = CONFIGS["hypenet 1111"]
    model, params = hub.load(stage / below)
    assert model == LanguageModel(config=config)
    assert_same_bits(params, random_params(config))
    hub.save(model, params, tmp_path / "export")
    assert_same_bits(hub.load(tmp_path / "export")[1], params)


def test_parameters_of_another_model(tmp_path):
    config = CONFIGS["hypenet 1111"]
    params = random_params(config)
    del params["layer_0"]["mixer"]["gate"]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": params, "step": 1}, {"model": config_to_dict(config)})
    with pytest.raises(HypenetError, match="layer_0/mixer/gate"):
        hub.load(tmp_path)
