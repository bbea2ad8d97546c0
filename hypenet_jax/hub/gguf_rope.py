"""Llama 3's RoPE scaling out of a GGUF file, which holds only what it does to each frequency."""

from __future__ import annotations

import math

import numpy as np

from hypenet_jax.errors import HypenetError
from hypenet_jax.model.config import RopeScaling

# The factors are stored in float32.
_TOLERANCE = 1e-4


def recover_scaling(factors: np.ndarray, theta: float, where: str) -> RopeScaling | None:
    """The scaling whose divisors of the d/2 frequencies are `factors`; None where all are 1.

    Frequencies j = 0..d/2-1 are theta^(-2j/d). Llama 3 divides those of long waves by `factor`, leaves those of short
    waves, and in between multiplies by (1-s)/factor + s with s = (original/wave - low) / (high - low). That is linear
    in 1/wave, so a line through the values in between gives original/low and high/low; low itself does not matter
    and is taken as 1.

    Raises:
      HypenetError: the factors are not of that form.
    """
    factors = np.asarray(factors, np.float64)
    if np.allclose(factors, 1.0, atol=_TOLERANCE):
        return None
    factor = float(factors.max())
    frequencies = theta ** (-np.arange(factors.size) / factors.size)
    between = (factors > 1 + _TOLERANCE) & (factors < factor * (1 - _TOLERANCE))
    if between.sum() >= 2:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(frequencies[between] / (2 * math.pi), smooth, 1)
        if slope > 0 > offset:
            scaling = RopeScaling(
                factor=_tidy(factor),
                low_freq_factor=1.0,
                high_freq_factor=_tidy(1.0 - 1.0 / offset),
                original_max_position=round(-slope / offset),
            )
            if np.allclose(divisors(frequencies, scaling), factors, rtol=_TOLERANCE):
                return scaling
    raise HypenetError(f"rope_freqs.weight of {where} is no Llama 3 scaling; load it from its Hugging Face directory")


def divisors(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """What Llama 3 divides each frequency by, float64."""
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return 1.0 / ((1 - smooth) / scaling.factor + smooth)


def _tidy(value: float) -> float:
    """A fitted value without the last digits, which are noise."""
    return float(f"{value:.4g}")
