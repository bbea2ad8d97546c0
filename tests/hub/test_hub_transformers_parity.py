"""Tiny random Qwen3 and Llama models: transformers and this package agree, in both directions."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity with transformers needs torch")
transformers = pytest.importorskip("transformers", reason="parity with transformers needs transformers")

from hub_models import LLAMA3, assert_same_bits  # noqa: E402

from hypenet_jax import hub  # noqa: E402
from hypenet_jax.data.tokenizers import byte_tokenizer  # noqa: E402
from hypenet_jax.model import LanguageModel  # noqa: E402

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 256,
}  # fmt: skip
LLAMA3_VALUES = {
    "rope_type": "llama3", "factor": LLAMA3.factor, "low_freq_factor": LLAMA3.low_freq_factor,
    "high_freq_factor": LLAMA3.high_freq_factor, "original_max_position_embeddings": LLAMA3.original_max_position,
}  # fmt: skip
CASES = {
    "qwen3 tied": ("Qwen3", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3 untied": ("Qwen3", {"tie_word_embeddings": False, "rope_theta": 1e6}),
    "llama": ("Llama", {"tie_word_embeddings": True, "rope_theta": 1e5, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"tie_word_embeddings": False, "rope_theta": 5e5, "rope_scaling": dict(LLAMA3_VALUES)}),
}
ATOL = 1e-4


def reference(case):
    family, changes = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Far from the initialisation, where norms are 1 and logits almost equal.
            scale, shift = (0.3, 1.0) if "norm" in name else (0.15, 0.0)
            parameter.copy_(shift + scale * torch.randn_like(parameter))
    return model


def logits_of(reference_model, tokens_BT):
    with torch.no_grad():
        return reference_model(torch.as_tensor(tokens_BT)).logits.numpy()


TOKENS_BT = np.random.default_rng(0).integers(0, 300, (2, 200))


@pytest.mark.parametrize("case", CASES)
def test_logits(tmp_path, case):
    theirs = reference(case)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = hub.load(tmp_path / "theirs")
    assert (model.config.rope_scaling == LLAMA3) == (case == "llama3")
    wanted = logits_of(theirs, TOKENS_BT)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(model.logits(params, TOKENS_BT), wanted, atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_what_we_save_is_read_by_transformers(tmp_path, case):
    theirs = reference(case)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = hub.load(tmp_path / "theirs")
    model = LanguageModel(config=model.config, tokenizer=byte_tokenizer())
    hub.save(model, params, tmp_path / "ours", max_shard_bytes=20000)
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(logits_of(again.eval(), TOKENS_BT), logits_of(theirs, TOKENS_BT))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer("a cat", add_special_tokens=False)["input_ids"] == byte_tokenizer().encode("a cat")
    assert tokenizer.eos_token_id == 256
    assert_same_bits(hub.load(tmp_path / "ours")[1], params)
