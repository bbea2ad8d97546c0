"""Weights that are damaged or do not belong to their config: one sentence naming the file or the tensor."""

import json

import ml_dtypes
import numpy as np
import pytest
from hub_models import CONFIGS, assert_same_bits, edit_json, random_params
from safetensors.numpy import load_file, save_file

from hypenet_jax import hub
from hypenet_jax.errors import HypenetError
from hypenet_jax.model import LanguageModel

UP = "model.layers.1.mlp.up_proj.weight"


def saved(tmp_path, name="qwen3 tied", limit=10**9):
    hub.save(LanguageModel(config=CONFIGS[name]), random_params(CONFIGS[name]), tmp_path / "m", max_shard_bytes=limit)
    return tmp_path / "m"


def change(directory, **tensors):
    path = directory / "model.safetensors"
    held = load_file(path) | tensors
    save_file({name: array for name, array in held.items() if array is not None}, path)


def refused(directory, words):
    with pytest.raises(HypenetError, match=words) as caught:
        hub.load(directory)
    assert "\n" not in str(caught.value)


def test_missing_and_unexpected_tensors(tmp_path):
    directory = saved(tmp_path)
    change(directory, **{UP: None})
    refused(directory, f"lacks the tensor {UP};")
    change(
        directory, **{UP: np.zeros((40, 24), np.float32), "model.layers.0.self_attn.q_proj.bias": np.zeros(32, "f4")}
    )
    refused(directory, r"unexpected tensor model\.layers\.0\.self_attn\.q_proj\.bias;")


def test_many_missing_tensors_are_counted(tmp_path):
    directory = saved(tmp_path)
    edit_json(directory / "config.json", num_hidden_layers=3)
    refused(directory, "lacks the tensor model.layers.2.input_layernorm.weight, .* and 8 more;")


def test_a_wrong_shape(tmp_path):
    directory = saved(tmp_path)
    change(directory, **{UP: np.zeros((24, 40), np.float32)})
    refused(directory, rf"{UP} .*\(24, 40\).*\(40, 24\)")


def test_a_dtype_that_is_no_float(tmp_path):
    directory = saved(tmp_path)
    change(directory, **{UP: np.zeros((40, 24), np.int8)})
    refused(directory, f"{UP} .* I8")


def test_old_buffers_are_ignored(tmp_path):
    directory = saved(tmp_path)
    before = hub.load(directory)[1]
    change(directory, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    assert_same_bits(hub.load(directory)[1], before)


def test_a_tied_head_that_is_stored(tmp_path):
    directory = saved(tmp_path)
    before = hub.load(directory)[1]
    change(directory, **{"lm_head.weight": before["embedding"]})
    assert_same_bits(hub.load(directory)[1], before)
    change(directory, **{"lm_head.weight": before["embedding"] + 1})
    refused(directory, "tie_word_embeddings")


def test_an_untied_head_that_is_missing(tmp_path):
    directory = saved(tmp_path)
    edit_json(directory / "config.json", tie_word_embeddings=False)
    refused(directory, r"lacks the tensor lm_head\.weight")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(tmp_path, keep):
    path = saved(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path / "m", r"model\.safetensors is not a whole safetensors file")


def test_no_weights(tmp_path):
    directory = saved(tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(directory, r"pytorch_model\.bin")


def test_shards_and_their_index(tmp_path):
    directory = saved(tmp_path, limit=8000)
    index = directory / "model.safetensors.index.json"
    good, listed = index.read_text(), json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=listed | {UP: "model-00001-of-00002.safetensors"})
    refused(directory, r"model-00001-of-00002\.safetensors, which is not there")
    edit_json(index, weight_map=listed | {UP: listed["model.embed_tokens.weight"]})
    refused(directory, f"lacks the tensor {UP}")
    edit_json(index, weight_map=...)
    refused(directory, "weight_map")
    index.write_text(good)
    (directory / listed[UP]).unlink()
    refused(directory, "which is not there")


def test_mixed_dtypes_become_one(tmp_path):
    directory = saved(tmp_path)
    before = hub.load(directory)[1]
    half = before["layer_1"]["mlp"]["up"].astype(ml_dtypes.bfloat16)
    change(directory, **{UP: np.ascontiguousarray(half.T)})
    after = hub.load(directory)[1]
    before["layer_1"]["mlp"]["up"] = half.astype(np.float32)
    assert_same_bits(after, before)


def test_loaded_arrays_do_not_hang_on_the_file(tmp_path):
    directory = saved(tmp_path)
    params = hub.load(directory)[1]
    assert params["embedding"].flags.writeable and params["embedding"].flags.owndata
    assert params["layer_0"]["mixer"]["q"].flags.c_contiguous
