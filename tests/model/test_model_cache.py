"""A sequence read at once, in chunks, and token by token gives the same hidden states, padding or not."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypenet_jax.model import LanguageModel, LogitsScaling
from hypenet_jax.model.config import POSITIONS

T = 24
HYPE = LogitsScaling("hype", 4.0)

VARIANTS = {
    "attention only": ("aa", {}, {"logits_scaling": HYPE}),
    "lightning only": ("ll", {}, {}),
    "constant scaling, no gates": (
        "la",
        {"output_gate": False},
        {"attention_gate": False, "logits_scaling": LogitsScaling("constant", 1.5)},
    ),
    "grouped heads in lightning": ("al", {"num_heads": 6, "num_kv_heads": 2}, {"num_kv_heads": 1}),
} | {
    f"positions {name}": ("lal", {"rope": rnn}, {"attention_rope": attention, "logits_scaling": HYPE})
    for name, (attention, rnn) in POSITIONS.items()
}


@functools.partial(jax.jit, static_argnums=0)
def _step(model, params, tokens_BT, cache, valid_BT=None):
    return model.step(params, tokens_BT, cache, valid_BT)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(model, params, tokens_BT):
    return model.hidden(params, tokens_BT)


def _read(model, params, tokens_BT, widths):
    cache, pieces = model.init_cache(len(tokens_BT), T + 3), []
    for start, width in zip(np.cumsum([0, *widths]), widths, strict=False):
        hidden, cache = _step(model, params, tokens_BT[:, start : start + width], cache)
        pieces.append(hidden)
    return np.concatenate(pieces, axis=1), cache


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_full_chunked_and_stepwise_agree(tiny_config, random_params, variant):
    mixers, lightning, overrides = variant
    model = LanguageModel(tiny_config(mixers, lightning, **overrides))
    params = random_params(model)
    tokens_BT = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, T))
    full = np.asarray(_hidden(model, params, tokens_BT))
    tolerance = {"rtol": 1e-5, "atol": 5e-6 * np.abs(full).max()}
    caches = []
    for widths in ([8] * 3, [1] * T):
        hidden, cache = _read(model, params, tokens_BT, widths)
        np.testing.assert_allclose(hidden, full, **tolerance)
        np.testing.assert_array_equal(cache["length"], [T, T])
        caches.append(cache)
    for one, other in zip(jax.tree.leaves(caches[0]), jax.tree.leaves(caches[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(one).max())


@pytest.fixture(scope="module")
def hybrid(tiny_config, random_params) -> tuple[LanguageModel, dict]:
    model = LanguageModel(tiny_config("lal", attention_rope=True, logits_scaling=HYPE))
    return model, random_params(model)


@given(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=3, max_size=3), st.integers(0, 1000))
def test_padding_leaves_the_cache_untouched(hybrid, valid, seed):
    """Chunks with padding anywhere equal the same rows without it; rows advance independently."""
    model, params = hybrid
    valid_BT, rng = np.array(valid), np.random.default_rng(seed)
    tokens_BT = rng.integers(0, model.config.vocab_size, (3, T))
    cache, pieces = model.init_cache(3, T + 3), []
    for start in range(0, T, 8):
        piece = slice(start, start + 8)
        hidden, cache = _step(model, params, tokens_BT[:, piece], cache, jnp.asarray(valid_BT[:, piece]))
        pieces.append(hidden)
    got = np.concatenate(pieces, axis=1)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(cache["length"], valid_BT.sum(axis=1))
    dense_BT = np.zeros_like(tokens_BT)
    for row, mask in enumerate(valid_BT):
        dense_BT[row, : mask.sum()] = tokens_BT[row, mask]
    full = np.asarray(_hidden(model, params, dense_BT))
    for row, mask in enumerate(valid_BT):
        np.testing.assert_allclose(got[row, mask], full[row, : mask.sum()], rtol=1e-5, atol=1e-5 * np.abs(full).max())


@pytest.mark.parametrize("width", [1, 8])
def test_a_step_of_padding_changes_no_bit(hybrid, width):
    model, params = hybrid
    tokens_BT = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 8))
    _, before = _step(model, params, tokens_BT, model.init_cache(2, T + 3))
    _, after = _step(model, params, tokens_BT[:, :width], before, np.array([[False] * width, [True] * width]))
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        assert np.any(one[1] != other[1])


def test_cache_has_the_stated_layout(tiny_config):
    model = LanguageModel(tiny_config("la"), "bfloat16")
    cache = model.init_cache(2, 10)
    assert cache["length"].dtype == jnp.int32
    state, keys = cache["layers"][0]["state"], cache["layers"][1]["k"]
    assert (state.shape, state.dtype) == ((2, 3, 8, 8), jnp.float32)
    assert (keys.shape, keys.dtype) == ((2, 10, 2, 8), jnp.bfloat16)
