"""GGUF files: parameters to the bit, RoPE order, quantisation, metadata, Llama 3's frequencies, every refusal."""

import dataclasses

import gguf
import numpy as np
import pytest
from hub_gguf_files import stored_tensors, write_gguf
from hub_models import CONFIGS, LLAMA3, assert_same_bits, flat, random_params
from hypothesis import given
from hypothesis import strategies as st

from hypenet_jax import hub
from hypenet_jax.cli import main
from hypenet_jax.data.packing import PackedTokens
from hypenet_jax.errors import HypenetError
from hypenet_jax.hub.gguf_rope import divisors, recover_scaling
from hypenet_jax.model import RopeScaling

PLAIN = {name: CONFIGS[name] for name in ("qwen3 tied", "qwen3 untied", "llama")}
# Rows of 32 and 64 values, so that every matrix can be quantised.
WIDE = {
    name: dataclasses.replace(config, hidden_size=64, intermediate_size=96, head_dim=16, vocab_size=120)
    for name, config in PLAIN.items()
}


def written(tmp_path, config, **options):
    params = random_params(config)
    return write_gguf(tmp_path / "m.gguf", config, stored_tensors(config, params), **options), params


def test_a_corpus_is_packed_with_its_tokenizer(tmp_path, capsys):
    path, _ = written(tmp_path, WIDE["llama"])
    tokenizer = hub.load(path)[0].tokenizer
    assert hub.tokenizer_of(str(path)) == tokenizer
    (tmp_path / "text.txt").write_text("cat cat's cat")
    packing = ["pack", str(tmp_path / "text.txt"), "--tokenizer", str(path), "--out"]
    assert main([*packing, str(tmp_path / "packed")]) == 0
    ids = PackedTokens(tmp_path / "packed", tokenizer).slice(0, 3)[0]
    assert list(ids) == tokenizer.encode("cat cat's cat")[:3]
    bare, _ = written(tmp_path, WIDE["llama"], pre=None)
    assert main([*packing, str(tmp_path / "other")]) == 2
    assert f"{bare} holds no tokenizer; give a model directory" in capsys.readouterr().err


@pytest.mark.parametrize("name", PLAIN)
def test_parameters_and_config(tmp_path, name):
    config = PLAIN[name]
    path, params = written(tmp_path, config, pre=None)
    model, loaded = hub.load(path)
    assert_same_bits(loaded, params)
    assert model.config == dataclasses.replace(config, bos_id=None, eos_ids=(), pad_id=None)
    assert hub.read_config(path) == model.config
    assert model.tokenizer is None


@pytest.mark.parametrize(("quantisation", "tolerance"), [("F16", 6e-4), ("BF16", 5e-3), ("Q8_0", 1e-2), ("Q4_1", 0.12)])
@pytest.mark.parametrize("name", ["qwen3 untied", "llama"])
def test_quantised_parameters_are_close(tmp_path, name, quantisation, tolerance):
    path, params = written(tmp_path, WIDE[name], quantisation=quantisation)
    _, loaded = hub.load(path)
    loaded, params = flat(loaded), flat(params)
    for tensor, value in params.items():
        # The error of a block of 32 is a share of its largest value.
        np.testing.assert_allclose(
            loaded[tensor], value, atol=tolerance * np.abs(value).max(), rtol=0, err_msg=str(tensor)
        )
    assert np.any(loaded[("embedding",)] != params[("embedding",)])


@pytest.mark.parametrize("name", ["qwen3 untied", "llama"])
def test_the_same_model_as_from_a_directory(tmp_path, name):
    path, params = written(tmp_path, WIDE[name])
    model, loaded = hub.load(path)
    hub.save(model, loaded, tmp_path / "out")
    again, params_again = hub.load(tmp_path / "out")
    assert again == model and again.tokenizer.fingerprint == model.tokenizer.fingerprint
    assert again.tokenizer.stop_ids == model.tokenizer.stop_ids == model.config.eos_ids
    assert_same_bits(params_again, params)


def test_dtype_and_place(tmp_path):
    path, params = written(tmp_path, PLAIN["llama"], pre=None)
    seen = []
    model, _ = hub.load(path, "bfloat16", place=lambda path, array: seen.append((path, array.dtype.name)))
    assert sorted(seen) == sorted((path, "bfloat16") for path in flat(params)) and model.dtype == "bfloat16"


@given(
    factor=st.sampled_from([4.0, 8.0, 32.0]),
    high=st.sampled_from([3.0, 4.0, 8.0]),
    original=st.sampled_from([2048, 4096, 8192]),
    theta=st.sampled_from([1e5, 5e5]),
    width=st.sampled_from([64, 128]),
)
def test_llama3_scaling_is_recovered(factor, high, original, theta, width):
    wanted = RopeScaling(factor, 1.0, high, original)
    frequencies = theta ** (-np.arange(width // 2) / (width // 2))
    factors = divisors(frequencies, wanted).astype(np.float32)
    assert recover_scaling(factors, theta, "m.gguf") == wanted
    # Only the ratios to the low factor matter.
    same = RopeScaling(factor, 2.0, 2 * high, 2 * original)
    np.testing.assert_allclose(divisors(frequencies, same), factors, rtol=1e-6)


def test_divisors_are_those_of_the_layers():
    from hypenet_jax.model import layers

    frequencies = 5e5 ** (-np.arange(32) / 32)
    wanted = np.asarray(layers.rope_frequencies(64, 5e5, LLAMA3))
    np.testing.assert_allclose(frequencies / divisors(frequencies, LLAMA3), wanted, rtol=1e-5)


def test_scaling_through_a_file(tmp_path):
    config = dataclasses.replace(WIDE["llama"], head_dim=64, rope_theta=5e5, rope_scaling=LLAMA3)
    params = random_params(config)
    frequencies = 5e5 ** (-np.arange(32) / 32)
    tensors = stored_tensors(config, params) | {"rope_freqs.weight": divisors(frequencies, LLAMA3)}
    model, loaded = hub.load(write_gguf(tmp_path / "m.gguf", config, tensors))
    assert model.config.rope_scaling == LLAMA3
    assert_same_bits(loaded, params)
    tensors["rope_freqs.weight"] = np.ones(32)
    assert hub.load(write_gguf(tmp_path / "m.gguf", config, tensors))[0].config.rope_scaling is None
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 32)
    with pytest.raises(HypenetError, match="rope_freqs"):
        hub.load(write_gguf(tmp_path / "m.gguf", config, tensors))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "gemma"}, "'gemma'.*llama, qwen3"),
        ({"extra": {"llama.expert_count": 8}}, r"llama\.expert_count .* 8"),
        ({"extra": {"llama.attention.sliding_window": 4096}}, "sliding_window"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "'yarn'"),
        ({"extra": {"llama.rope.dimension_count": 6}}, "dimension_count .* 6"),
        ({"extra": {"split.count": 3}}, "3 pieces"),
    ],
)
def test_unsupported_files(tmp_path, options, words):
    path, _ = written(tmp_path, PLAIN["llama"], **options)
    with pytest.raises(HypenetError, match=words):
        hub.load(path)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama", {"blk.1.ffn_up.weight": None}, r"lacks the tensor blk\.1\.ffn_up\.weight"),
        ("llama", {"blk.1.attn_q.bias": np.zeros(32)}, r"unexpected tensor blk\.1\.attn_q\.bias"),
        ("llama", {"blk.1.ffn_up.weight": np.zeros((24, 40))}, r"blk\.1\.ffn_up\.weight .*\(24, 40\)"),
        ("llama", {"token_embd.weight": None}, "token_embd"),
        ("qwen3 tied", {"blk.0.attn_q_norm.weight": None}, "attn_q_norm"),
    ],
)
def test_tensors_that_do_not_belong(tmp_path, name, change, words):
    tensors = stored_tensors(PLAIN[name], random_params(PLAIN[name])) | change
    tensors = {key: value for key, value in tensors.items() if value is not None}
    with pytest.raises(HypenetError, match=words):
        hub.load(write_gguf(tmp_path / "m.gguf", PLAIN[name], tensors, pre=None))


def test_damaged_files(tmp_path):
    path, _ = written(tmp_path, PLAIN["llama"], pre=None)
    whole = path.read_bytes()
    for keep in (4, 20, 200, len(whole) // 2, len(whole) - 400):
        path.write_bytes(whole[:keep])
        with pytest.raises(HypenetError, match=r"m\.gguf is not a whole GGUF file"):
            hub.load(path)
    path.write_bytes(b"PK" + whole[2:])
    with pytest.raises(HypenetError, match="is no GGUF file"):
        hub.load(path)


def test_a_quantisation_that_cannot_be_undone(tmp_path, monkeypatch):
    path, _ = written(tmp_path, PLAIN["llama"], pre=None)

    def refuse(data, kind):
        raise NotImplementedError(kind)

    monkeypatch.setattr(gguf.quants, "dequantize", refuse)
    with pytest.raises(HypenetError, match=r"token_embd\.weight .* F32, which cannot be undone"):
        hub.load(path)
