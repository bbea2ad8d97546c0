"""The distribution that a token is drawn from, against numpy, and where the randomness comes from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypenet_jax.errors import HypenetError
from hypenet_jax.inference import Sampling, prompt_seed, sample
from hypenet_jax.inference.sampling import restrict

V = 23


def _probabilities(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Token by token: temperature, then the k likeliest, then the likeliest until their mass reaches p."""
    scaled = logits.astype(np.float64) / temperature
    weight = np.exp(scaled - scaled.max())
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
    total, kept, mass = weight[order].sum(), [], 0.0
    for token in order:
        kept.append(token)
        mass += weight[token] / total
        if top_p is not None and mass >= top_p:
            break
    result = np.zeros(len(logits))
    result[kept] = weight[kept] / weight[kept].sum()
    return result


def _logits(seed: int) -> np.ndarray:
    return 2 * np.random.default_rng(seed).standard_normal(V).astype(np.float32)


@given(
    st.integers(0, 10_000),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([None, 1, 2, 5, V, V + 9]),
    st.sampled_from([None, 0.01, 0.3, 0.7, 0.95, 1.0]),
)
def test_restricted_distribution(seed, temperature, top_k, top_p):
    logits = _logits(seed)
    got = jax.nn.softmax(restrict(jnp.asarray(logits)[None] / temperature, top_k, top_p)[0])
    np.testing.assert_allclose(got, _probabilities(logits, temperature, top_k, top_p), rtol=2e-5, atol=1e-8)


def test_ties_with_the_last_kept_token_are_kept():
    tied = jnp.asarray([[0.0, 3.0, 3.0, 3.0, 1.0]])
    np.testing.assert_array_equal(np.isfinite(restrict(tied, 2, None)), [[False, True, True, True, False]])


@pytest.mark.parametrize("settings", [(1.0, None, None), (0.7, 6, None), (1.5, None, 0.6), (1.0, 8, 0.9)])
def test_draws_follow_the_distribution(settings):
    """Chi-square of 20,000 draws: beyond 1e-6 of the tail the frequencies are wrong."""
    draws, logits = 20_000, _logits(5)
    tokens = jax.jit(sample, static_argnums=3)(
        jnp.broadcast_to(logits, (draws, V)), jnp.arange(draws, dtype=jnp.uint32), 0, Sampling(*settings)
    )
    expected = draws * _probabilities(logits, *settings)
    counts = np.bincount(tokens, minlength=V)
    assert (counts[expected == 0] == 0).all()
    used = expected > 0
    statistic = np.sum((counts[used] - expected[used]) ** 2 / expected[used])
    freedom = used.sum() - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom) + 15


def test_greedy_takes_the_first_of_the_largest():
    logits_BV = jnp.asarray([[0.0, 2.0, 2.0], [5.0, 1.0, 2.0]])
    np.testing.assert_array_equal(sample(logits_BV, jnp.zeros(2, jnp.uint32), 0, Sampling()), [1, 0])


@pytest.mark.parametrize("temperature", [1e-20, 1e-37, 1e-40, 5e-324])
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_a_temperature_near_zero_is_greedy(temperature, top_p):
    """Logits divided by it would be infinite in float32, and all tokens alike."""
    logits = jnp.asarray([[1.0, 30.0, 29.9, -4.0], [-9.0, -8.0, -7.0, -7.5]])
    seeds = jnp.arange(2, dtype=jnp.uint32)
    assert sample(logits, seeds, 0, Sampling(temperature, None, top_p)).tolist() == [1, 2]


def test_a_row_depends_on_its_logits_seed_and_index_alone():
    draw = jax.jit(sample, static_argnums=3)
    logits_BV = np.stack([_logits(seed) for seed in range(8)])
    seeds_B = np.arange(100, 108, dtype=np.uint32)
    sampling = Sampling(1.0, 20, 0.99)
    batch = np.stack([draw(logits_BV, seeds_B, index, sampling) for index in range(5)])
    for row in (0, 3, 7):
        alone = [int(draw(logits_BV[[row]], seeds_B[[row]], index, sampling)[0]) for index in range(5)]
        assert alone == batch[:, row].tolist()
    order = np.array([5, 1, 0, 2, 7, 3, 4, 6])
    np.testing.assert_array_equal(draw(logits_BV[order], seeds_B[order], 4, sampling), batch[4, order])
    assert len({tuple(column) for column in batch.T}) > 4


def test_prompt_seeds_do_not_repeat():
    seeds = {prompt_seed(seed, index) for seed in range(40) for index in range(40)}
    assert len(seeds) == 1600 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(HypenetError, match=message):
        Sampling(**settings)
