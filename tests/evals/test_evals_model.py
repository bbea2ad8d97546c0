"""The measurements on a real network: a tiny hybrid with scaled queries."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from hypenet_jax.evals import niah, perplexity
from hypenet_jax.inference import generate
from hypenet_jax.model import LanguageModel, LightningConfig, LogitsScaling, ModelConfig

VOCAB = 61


@pytest.fixture(scope="module")
def hybrid():
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mixers=("lightning", "attention"),
        family="hypenet",
        attention_rope=False,
        attention_gate=True,
        logits_scaling=LogitsScaling("hype", 20.0),
        lightning=LightningConfig(num_heads=2, num_kv_heads=2, head_dim=8),
    )
    model = LanguageModel(config)
    params = jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 1 else leaf, model.init(jax.random.key(1)))
    return model, params


def test_forced_scores_are_those_of_greedy_generation(hybrid):
    model, params = hybrid
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (20, 33, 27, 40, 31)]
    written = generate(model, params, prompts, 5, stop_ids=[])
    samples = []
    for i, (prompt, new) in enumerate(zip(prompts, written, strict=True)):
        answer, other = list(new), list(new)
        other[-1] = (other[-1] + 1) % VOCAB
        if i % 2:  # wrong in its last token alone
            answer = other
        alternative = tuple(new[:3]) if i == 3 else tuple(other)
        samples.append(niah.NiahSample(tuple(prompt), "", tuple(answer), "S1", 48, 0.0, alternative))
    for chunk in (None, 16):
        forced = niah.score_forced(model, params, samples, batch_size=2, prefill_chunk=chunk)
        assert forced.correct == (True, False, True, True, True)
        strict = niah.score_forced(model, params, samples, 2, prefill_chunk=chunk, alternatives=False)
        assert strict.correct == (True, False, True, False, True)


def test_perplexity_is_that_of_the_logits(hybrid):
    model, params = hybrid
    windows = np.random.default_rng(2).integers(0, VOCAB, (3, 25))
    log_p = jax.nn.log_softmax(model.logits(params, windows[:, :-1]))
    nll = -np.take_along_axis(np.asarray(log_p), windows[:, 1:, None], -1).mean()
    assert perplexity.perplexity(model, params, windows, 2) == pytest.approx(np.exp(nll), rel=1e-5)
