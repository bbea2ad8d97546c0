"""How sure an accuracy is."""

from __future__ import annotations

import math


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
