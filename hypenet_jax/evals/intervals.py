"""How sure an accuracy, or a mean over a few runs, is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import scipy.special


def wilson(correct: float, total: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion (E. B. Wilson, 1927), 95% by default.

    Returns (low, high) within [0, 1]; (0, 1) when nothing was counted.
    """
    if total <= 0:
        return 0.0, 1.0
    share = correct / total
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    centre = share + z * z / (2 * total)
    scale = 1 + z * z / total
    low = (centre - spread) / scale if correct > 0 else 0.0
    high = (centre + spread) / scale if correct < total else 1.0
    return max(0.0, low), min(1.0, high)


def wilson_of_seeds(counts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Wilson's 95% interval of the mean share found by several seeds, of (found, asked) each, all asked the same.

    As wide as one seed's: more seeds ask no new questions. It does not say how far seeds lie apart.
    """
    found, asked = (math.fsum(values) / len(counts) for values in zip(*counts, strict=True))
    return wilson(found, round(asked))


def student_t(values: Sequence[float], confidence: float = 0.95) -> dict[str, float | None]:
    """{"mean", "low", "high"}: the mean's interval by Student's t over independent values; one value has none."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None}
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    quantile = float(scipy.special.stdtrit(len(values) - 1, (1 + confidence) / 2))
    spread = quantile * math.sqrt(variance / len(values))
    return {"mean": mean, "low": mean - spread, "high": mean + spread}
