"""Weights and outputs of the stock and official PyTorch models, through `hub.load`."""

import json

import numpy as np
import pytest
from hub_models import assert_same_bits, write_directory
from safetensors.numpy import load_file

from hypenet_jax import hub
from hypenet_jax.model import LogitsScaling

NAMES = ["a_qwen3_tied", "a_qwen3_untied", "b_hypenet"]


def golden_directory(shared, tmp_path, name, **changes):
    golden = shared / "golden"
    config = json.loads((golden / f"{name}.model.json").read_text())["config"] | changes
    return write_directory(tmp_path / name, config, load_file(golden / f"{name}.model.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_the_reference(shared, tmp_path, name):
    model, params = hub.load(golden_directory(shared, tmp_path, name))
    data = load_file(shared / "golden" / f"{name}.data.safetensors")
    atol = json.loads((shared / "golden" / f"{name}.data.json").read_text())["suggested_atol"]
    tokens_BT = data["input_ids"]
    np.testing.assert_allclose(model.hidden(params, tokens_BT), data["hidden_states"][-1], atol=atol, rtol=0)
    np.testing.assert_allclose(model.logits(params, tokens_BT), data["logits"], atol=atol, rtol=0)


def test_the_other_architecture_name_and_hype_500(shared, tmp_path):
    ours, params = hub.load(golden_directory(shared, tmp_path / "a", "b_hypenet"))
    changes = {"architectures": ["HybridForCausalLM"], "attn_logits_scaling": "hype 500"}
    published, same = hub.load(golden_directory(shared, tmp_path / "b", "b_hypenet", **changes))
    assert published == ours.with_logits_scaling(LogitsScaling("hype", 500.0))
    assert_same_bits(same, params)


@pytest.mark.parametrize("name", NAMES)
def test_saving_writes_the_stored_tensors_again(shared, tmp_path, name):
    directory = golden_directory(shared, tmp_path, name)
    hub.save(*hub.load(directory), tmp_path / "out")
    assert_same_bits(load_file(tmp_path / "out/model.safetensors"), load_file(directory / "model.safetensors"))
