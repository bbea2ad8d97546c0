"""The contract of the recurrence with scalar decay: what every backend's tests ask, against a float64 recurrence.

A backend is the function of a `dispatch.Backend`, perhaps with `interpret=True` bound to it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.lightning import reference, slopes
from kernels_pallas.selfcheck import relative_error

FLOAT32, BFLOAT16 = 1e-5, 4e-3
NAMES = ("o", "state", "dq", "dk", "dv", "dinitial_state", "dlog_decay")


def inputs(shape, seed=0, dtype=np.float32):
    """((q, k, v, initial_state, log_decay), (do, dstate)) for (B, T, H, K, V); q, k, v and do in `dtype`."""
    batch, length, heads, width, out = shape
    rng = np.random.default_rng(seed)
    tokens = (batch, length, heads)
    sizes = [(*tokens, width), (*tokens, width), (*tokens, out), (batch, heads, width, out), tokens]
    values = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    values[4] = -np.abs(values[4])
    cotangents = [rng.standard_normal(size).astype(np.float32) for size in sizes[2:4]]
    values[:3] = [np.asarray(x.astype(dtype)) for x in values[:3]]
    return values, [np.asarray(cotangents[0].astype(dtype)), cotangents[1]]


def segments(shape, seed=0, runs=0.06, padding=0.1):
    """Ids that change with probability `runs`, with padding in front, between and behind."""
    rng = np.random.default_rng(seed)
    ids = np.cumsum(rng.random(shape[:2]) < runs, axis=1)
    ids[rng.random(shape[:2]) < padding] = -1
    if shape[1] > 4:
        ids[0, :3], ids[-1, -3:] = -1, -2
    return ids.astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(function, precision, gated, values, cotangents, segment_ids):
    """Results and gradients of a backend; `gated` means with a decay a token, which is differentiated too."""

    def call(q, k, v, initial_state, log_decay):
        decay = {"log_decay_BTH": log_decay} if gated else {"slopes_H": slopes(q.shape[2])}
        options = {"initial_state": initial_state, "segment_ids": segment_ids, "precision": precision}
        return function(q, k, v, scale=q.shape[-1] ** -0.5, **decay, **options)

    outputs, pull = jax.vjp(call, *values)
    gradients = pull((cotangents[0].astype(outputs[0].dtype), cotangents[1].astype(outputs[1].dtype)))
    return (*outputs, *gradients)


def expected(values, cotangents, segment_ids, gated=False):
    """The same from the recurrence in float64."""
    with jax.enable_x64(True):
        wide = [[np.asarray(x, np.float64) for x in xs] for xs in (values, cotangents)]
        return [np.asarray(x) for x in run(reference.BACKEND.function, "default", gated, *wide, segment_ids)]


def errors(results, right, values) -> dict[str, float]:
    """Relative errors by name."""
    # The decay's gradient is the difference of two such sums, which may all but cancel.
    summed = float(np.linalg.norm(np.sum(np.abs(np.asarray(values[0], np.float64) * right[2]), axis=-1)))
    floors = dict.fromkeys(NAMES, 1e-6) | {"dlog_decay": max(summed, 1e-6)}
    return {n: relative_error(x, y, floors[n]) for n, x, y in zip(NAMES, results, right, strict=True)}


def check(function, shape, *, seed=0, dtype=np.float32, precision="default", segment_ids=None, gated=False, tolerance):
    """A backend's outputs and gradients on random inputs are within a relative `tolerance` of the float64 recurrence.

    With precision "high" that holds of what is computed, before bfloat16 results are rounded to bfloat16: those are
    held to the rounding's size.
    """
    values, cotangents = inputs(shape, seed, dtype)
    results = run(function, precision, gated, values, cotangents, segment_ids)
    assert results[0].dtype == results[2].dtype == dtype and results[1].dtype == np.float32
    for name, error in errors(results, expected(values, cotangents, segment_ids, gated), values).items():
        rounded = dtype == jnp.bfloat16 and name in ("o", "dq", "dk", "dv")
        limit = max(tolerance, 2e-3) if rounded else tolerance
        assert error <= limit, f"{name}: {error:.2e}"
    if segment_ids is not None:
        for name, x in zip(("o", "dq", "dk", "dv"), (results[0], *results[2:5]), strict=True):
            assert not np.asarray(x, np.float32)[segment_ids < 0].any(), f"{name} at padding"
