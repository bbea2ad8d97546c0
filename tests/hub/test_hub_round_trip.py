"""Save and load: exact to the bit, in every family, sharded, in every dtype; mistakes end in one sentence."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hub_models import CONFIGS, assert_same_bits, flat, random_params
from safetensors.numpy import load_file

from hypenet_jax import hub
from hypenet_jax.data.tokenizers import byte_tokenizer
from hypenet_jax.errors import HypenetError
from hypenet_jax.model import LanguageModel


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_exact(tmp_path, name):
    model, params = LanguageModel(config=CONFIGS[name]), random_params(CONFIGS[name])
    hub.save(model, params, tmp_path / "out")
    loaded, again = hub.load(tmp_path / "out")
    assert loaded == model and loaded.tokenizer is None
    assert_same_bits(again, params)


@pytest.mark.parametrize("limit", [1, 5000, 20000])
def test_shards(tmp_path, limit):
    config = CONFIGS["hypenet 1111"]
    params = random_params(config)
    hub.save(LanguageModel(config=config), params, tmp_path / "out", max_shard_bytes=limit)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors" and len(files) > 1
    for file in files:
        held = load_file(tmp_path / "out" / file)
        assert len(held) == 1 or sum(array.nbytes for array in held.values()) <= limit
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in flat(params).values())
    assert_same_bits(hub.load(tmp_path / "out")[1], params)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_half_precision(tmp_path, name, dtype):
    config = CONFIGS["qwen3 untied"]
    params = random_params(config)
    hub.save(LanguageModel(config=config), params, tmp_path / "out", name)
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    model, stored = hub.load(tmp_path / "out", name)
    assert model.dtype == name and json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == name
    assert_same_bits(stored, rounded)
    # Loaded in float32 and stored again, no bit moves.
    model, params = hub.load(tmp_path / "out")
    assert_same_bits(params, jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded))
    hub.save(model, params, tmp_path / "again", name)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_float16_overflow_is_refused(tmp_path):
    params = random_params(CONFIGS["llama"])
    params["layer_1"]["mlp"]["up"][0, 0] = 1e6
    with pytest.raises(HypenetError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .*float16"):
        hub.save(LanguageModel(config=CONFIGS["llama"]), params, tmp_path / "out", "float16")
    assert list(tmp_path.iterdir()) == []


def test_jax_arrays_are_saved_and_placed(tmp_path):
    config = CONFIGS["qwen3 tied"]
    params = random_params(config)
    sharding = jax.sharding.NamedSharding(jax.make_mesh((4,), ("tensor",)), jax.sharding.PartitionSpec())
    on_devices = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), params)
    hub.save(LanguageModel(config=config), on_devices, tmp_path / "out")
    seen = []

    def place(path, array):
        seen.append(path)
        return jnp.asarray(array)

    model, placed = hub.load(tmp_path / "out", compute_dtype="bfloat16", place=place)
    assert sorted(seen) == sorted(flat(params)) and model.dtype == "bfloat16"
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(placed))
    assert_same_bits(placed, params)


def test_files_and_keys_of_an_export(tmp_path):
    config = dataclasses.replace(CONFIGS["hypenet 1111"], vocab_size=300, eos_ids=(256,), pad_id=256, bos_id=None)
    model = LanguageModel(config=config, tokenizer=byte_tokenizer())
    hub.save(model, random_params(config), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "hypenet_jax.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert values["architectures"] == ["HypeNetForCausalLM"] and values["model_type"] == "hypenet"
    assert values["mixer_types"] == ["lightning-attn", "attn"] and values["attn_logits_scaling"] == 1.5
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 256
    assert json.loads((tmp_path / "out/hypenet_jax.json").read_text())["made_by"] == "hypenet_jax"
    loaded, _ = hub.load(tmp_path / "out")
    assert loaded.tokenizer.fingerprint == model.tokenizer.fingerprint
    assert loaded.tokenizer.eos_id == 256 and loaded.tokenizer.encode("ab") == [97, 98]


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path):
    small = LanguageModel(config=CONFIGS["llama"], tokenizer=byte_tokenizer())
    with pytest.raises(HypenetError, match="257 tokens but the model only 37"):
        hub.save(small, random_params(CONFIGS["llama"]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    config = dataclasses.replace(CONFIGS["llama"], eos_ids=())
    hub.save(LanguageModel(config=config), random_params(config), tmp_path / "out")
    byte_tokenizer().save(tmp_path / "out")
    with pytest.raises(HypenetError, match="257 tokens but the model only 37"):
        hub.load(tmp_path / "out")


def _without_leaf(params):
    del params["layer_0"]["mixer"]["q"]


def _with_leaf(params):
    params["layer_0"]["mixer"]["z"] = np.zeros(3)


def _with_wrong_shape(params):
    params["layer_0"]["mlp"]["up"] = params["layer_0"]["mlp"]["up"].T


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_without_leaf, "lacks the parameter layer_0/mixer/q;"),
        (_with_leaf, "unexpected parameter layer_0/mixer/z;"),
        (_with_wrong_shape, r"layer_0/mlp/up .*\(40, 24\).*\(24, 40\)"),
    ],
)
def test_a_tree_that_is_not_the_models(tmp_path, spoil, words):
    params = random_params(CONFIGS["llama"])
    spoil(params)
    with pytest.raises(HypenetError, match=words):
        hub.save(LanguageModel(config=CONFIGS["llama"]), params, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (None, "the parameters are of type NoneType; give the nested dict that `load` returns"),
        ([1], "the parameters are of type list"),
        ("embedding", "the parameter final_norm is of type str; it must be an array"),
    ],
)
def test_what_is_no_tree_of_arrays(tmp_path, params, words):
    config = CONFIGS["llama"]
    if params == "embedding":
        params = random_params(config) | {"final_norm": "x"}
    with pytest.raises(HypenetError, match=words):
        hub.save(LanguageModel(config), params, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unknown_dtypes(tmp_path):
    model, params = LanguageModel(config=CONFIGS["llama"]), random_params(CONFIGS["llama"])
    with pytest.raises(HypenetError, match="'int8'"):
        hub.save(model, params, tmp_path / "out", "int8")
    hub.save(model, params, tmp_path / "out")
    with pytest.raises(HypenetError, match="'float64'"):
        hub.load(tmp_path / "out", "float64")


def test_nothing_to_load(tmp_path):
    with pytest.raises(HypenetError, match="no model at .*Qwen"):
        hub.load(tmp_path / "Qwen/Qwen3-1.7B")
    with pytest.raises(HypenetError, match="the model gs://bkt/qwen3 is in no file system; mount its bucket"):
        hub.load("gs://bkt/qwen3")
    with pytest.raises(HypenetError, match=r"no config\.json"):
        hub.load(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(HypenetError, match=r"give the file .*model\.gguf"):
        hub.load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(HypenetError, match="no GGUF file"):
        hub.load(tmp_path / "notes.txt")
