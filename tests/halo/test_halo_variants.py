"""One layer replaced at a time: the network is a HypeNet built for it, and the scores are those measured on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hypenet_jax as hn
from hypenet_jax.evals.choice import choice, make_choices
from hypenet_jax.evals.recall import recall, recall_rows
from hypenet_jax.halo.align import mixers_of, with_mixers
from hypenet_jax.halo.variants import measure, variant_hidden


@pytest.fixture(scope="module")
def students(tiny):
    """The all-Lightning student, and for each layer the model with that layer alone replaced."""
    teacher, params = tiny
    rnn, rnn_params = hn.convert(teacher, params, (), seed=4)
    built = []
    for layer in range(2):
        config = dataclasses.replace(
            rnn.config,
            mixers=tuple("lightning" if i == layer else "attention" for i in range(2)),
            attention_rope=True,
            attention_gate=False,
        )
        trained = {f"layer_{layer}": rnn_params[f"layer_{layer}"]["mixer"]}
        built.append((dataclasses.replace(rnn, config=config), with_mixers(params, trained)))
    return rnn, mixers_of(rnn_params, 2), built


def test_the_replaced_layer_and_no_other(tiny, students, packed_batch):
    teacher, params = tiny
    rnn, mixer_params, built = students
    tokens, ids = packed_batch["tokens"], packed_batch["segment_ids"]
    hidden = jax.jit(variant_hidden(teacher, rnn))
    real = ids >= 0
    for layer, (model, mparams) in enumerate(built):
        flags = jnp.arange(2) == layer
        got = np.asarray(hidden(params, mixer_params, flags, tokens, ids))
        wanted = np.asarray(jax.jit(model.hidden)(mparams, tokens, ids))
        np.testing.assert_allclose(got[real], wanted[real], rtol=0, atol=2e-5)
    none = np.asarray(hidden(params, mixer_params, jnp.zeros(2, bool), tokens, ids))
    np.testing.assert_allclose(none[real], np.asarray(teacher.hidden(params, tokens, ids))[real], rtol=0, atol=2e-5)
    assert np.abs(got - none)[real].max() > 0.1


def kl(teacher, params, model, mparams, rows):
    wanted, got = (
        np.asarray(jax.nn.log_softmax(m.logits(p, rows.tokens, rows.segment_ids)), np.float64)
        for m, p in ((teacher, params), (model, mparams))
    )
    return (np.exp(wanted) * (wanted - got)).sum(-1)[rows.segment_ids >= 0].mean()


def test_the_scores(tiny, students):
    teacher, params = tiny
    rnn, mixer_params, built = students
    rng = np.random.default_rng(5)
    # Five rows in batches of two: the last batch is filled up.
    prompts = [rng.integers(0, 31, size).tolist() for size in (9, 14, 11, 3, 12)]
    answers = [rng.integers(0, 31, 4).tolist() for _ in prompts]
    rows = recall_rows(prompts, answers, 20)
    choices = make_choices([rng.integers(0, 31, 40) for _ in range(6)], 5, context=8, continuation=4)
    told = []
    measured = measure(
        teacher, params, rnn, mixer_params, recall_rows=rows, choices=choices, batch_size=2,
        report=lambda layer, scores: told.append((layer, scores)),
    )  # fmt: skip
    assert measured["teacher"]["kl"] == pytest.approx(0, abs=1e-6)
    for layer, (model, mparams) in enumerate(built):
        assert measured["recall"][layer] == recall(model, mparams, rows)
        assert measured["csr"][layer] == choice(model, mparams, choices)
        assert measured["kl"][layer] == pytest.approx(kl(teacher, params, model, mparams, rows), rel=1e-4)
        assert told[layer] == (layer, {name: measured[name][layer] for name in ("csr", "recall", "kl")})
    assert measured["teacher"]["recall"] == recall(teacher, params, rows)
