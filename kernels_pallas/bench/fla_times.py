"""Times of fla (flash-linear-attention, PyTorch) as JSON on the last line: run by `peers.fla` in its own process."""

from __future__ import annotations

import json
import statistics
import sys

import torch
from fla.ops.simple_gla import chunk_simple_gla

ROUNDS = 10


def milliseconds(function) -> float:
    """The median of `ROUNDS` calls between device events, after a warm-up that tunes."""
    for _ in range(3):
        function()
    times = []
    for _ in range(ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def milliseconds_or_why(function) -> float | str:
    """`milliseconds`, or that the shape is too large for the device."""
    try:
        return milliseconds(function)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "fails: out of memory"


def times(batch: int, length: int, heads: int, width: int) -> dict[str, float | str]:
    """Forward, and forward with backward, in bfloat16, with Lightning's decays of the heads."""
    shape = (batch, length, heads, width)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    cotangent = torch.randn_like(q)
    decays = -torch.tensor([2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)], device="cuda")

    def forward():
        return chunk_simple_gla(q, k, v, g_gamma=decays, output_final_state=True)[0]

    def both():
        for x in (q, k, v):
            x.grad = None
        forward().backward(cotangent)

    with torch.no_grad():
        alone = milliseconds_or_why(forward)
    shape_name = f"B{batch} T{length} H{heads}"
    return {f"lightning {shape_name}": alone, f"lightning + backward {shape_name}": milliseconds_or_why(both)}


if __name__ == "__main__":
    results: dict[str, float | str] = {}
    for shape in json.loads(sys.argv[1]):
        results |= times(*shape)
    print(json.dumps(results))
