"""The shared layers against direct computations in float64."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypenet_jax.model.config import LogitsScaling, RopeScaling
from hypenet_jax.model.layers import apply_rope, query_scaling, rms_norm, rope_frequencies, swiglu


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_rms_norm_of_every_head_alone():
    x, scale = 3 * _normal(0, 2, 5, 4, 8), _normal(1, 8)
    expected = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-6) * scale
    np.testing.assert_allclose(rms_norm(x, scale, 1e-6), expected, rtol=2e-6)


def test_rms_norm_of_all_heads_jointly():
    x, scale = _normal(0, 2, 5, 4, 8), _normal(1, 4, 8)
    flat = x.reshape(2, 5, 32).astype(np.float64)
    expected = flat / np.sqrt(np.mean(flat**2, axis=-1, keepdims=True) + 1e-6) * scale.reshape(32)
    np.testing.assert_allclose(rms_norm(x, scale, 1e-6).reshape(2, 5, 32), expected, rtol=2e-6)


def test_rms_norm_keeps_the_dtype_and_float32_statistics():
    x = jnp.full((1, 4096), 300.0, jnp.bfloat16)
    normed = rms_norm(x, np.ones(4096, np.float32), 1e-6)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(normed, np.float32), 1.0)


def test_frequencies_without_scaling():
    expected = [1e6 ** (-2 * i / 128) for i in range(64)]
    frequencies = rope_frequencies(128, 1e6)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, expected, rtol=1e-7)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_frequencies_with_llama3_scaling(factor):
    """By wavelength, as the Llama 3 description has it: long ones stretched, short ones kept, a ramp between."""
    low, high, original = 1.0, 4.0, 8192
    expected = []
    for i in range(64):
        frequency = 5e5 ** (-2 * i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            expected.append(frequency)
        elif wavelength > original / low:
            expected.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    scaled = rope_frequencies(128, 5e5, RopeScaling(factor, low, high, original))
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)
    assert (scaled[:20] == rope_frequencies(128, 5e5)[:20]).all() and scaled[-1] < rope_frequencies(128, 5e5)[-1]


@given(st.lists(st.integers(0, 100_000), min_size=6, max_size=6), st.integers(0, 99))
def test_rope_is_a_rotation_by_position(positions, seed):
    """Dimension i and i + D/2 as a complex number, turned in float64 by position times frequency."""
    x = _normal(seed, 1, 6, 2, 16)
    frequencies = rope_frequencies(16, 1e4)
    turn = np.exp(1j * np.outer(positions, frequencies.astype(np.float64)))[None, :, None]
    turned = (x[..., :8] + 1j * x[..., 8:]) * turn
    got = np.asarray(apply_rope(jnp.asarray(x), jnp.asarray([positions]), frequencies), np.float64)
    # A float32 angle near p radians is off by up to 2^-24 p.
    bound = np.abs(turned).max() * (2**-23 * max(positions) + 1e-6)
    np.testing.assert_allclose(got[..., :8] + 1j * got[..., 8:], turned, rtol=0, atol=bound)


def test_rope_angles_stay_float32_for_bfloat16_activations():
    x = jnp.asarray(_normal(0, 1, 1, 1, 16), jnp.bfloat16)
    frequencies = rope_frequencies(16, 1e4)
    expected = apply_rope(x.astype(jnp.float32), jnp.asarray([[4097]]), frequencies).astype(jnp.bfloat16)
    rotated = apply_rope(x, jnp.asarray([[4097]]), frequencies)
    assert rotated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(rotated, np.float32), np.asarray(expected, np.float32))


def test_query_scaling_values():
    positions = jnp.asarray([[0, 1, 499, 131071, 1048575]])
    expected = [[math.log(t + 500) / math.log(500) for t in positions[0].tolist()]]
    np.testing.assert_allclose(query_scaling(LogitsScaling("hype", 500.0), positions), expected, rtol=1e-6)
    assert query_scaling(LogitsScaling("hype", 500.0), positions)[0, 0] == pytest.approx(1.0, rel=1e-7)
    np.testing.assert_array_equal(query_scaling(LogitsScaling("constant", 1.5), positions), np.full((1, 5), 1.5))
    assert query_scaling(None, positions) is None


def test_query_scaling_of_padding_is_finite():
    scaled = query_scaling(LogitsScaling("hype", 1.5), jnp.asarray([[-1, 0]]))
    assert np.isfinite(scaled).all()


def test_swiglu():
    x, gate, up, down = _normal(0, 2, 3, 4), _normal(1, 4, 6), _normal(2, 4, 6), _normal(3, 6, 4)
    x64 = x.astype(np.float64)
    expected = ((x64 @ gate) / (1 + np.exp(-(x64 @ gate))) * (x64 @ up)) @ down
    np.testing.assert_allclose(swiglu({"gate": gate, "up": up, "down": down}, x), expected, rtol=1e-5, atol=1e-5)
