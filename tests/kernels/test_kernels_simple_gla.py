"""Linear attention with a decay a token: every backend against the float64 recurrence, the decay's gradient too."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.lightning import api, lightning_attention, simple_gla, slopes
from kernels_pallas.selfcheck import relative_error

NAMES = ("o", "state", "dq", "dk", "dv", "dlog_decay", "dinitial_state")


def _inputs(batch, length, heads, width, out, seed):
    rng = np.random.default_rng(seed)
    tokens = (batch, length, heads)
    sizes = [(*tokens, width), (*tokens, width), (*tokens, out), tokens, (batch, heads, width, out)]
    values = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    values[3] = -np.abs(values[3])
    cotangents = [rng.standard_normal(size).astype(np.float32) for size in (sizes[2], sizes[4])]
    ids = np.cumsum(rng.random(tokens[:2]) < 0.1, axis=1)
    ids[rng.random(tokens[:2]) < 0.15] = -1
    return values, cotangents, ids.astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _run(backend, values, cotangents, ids):
    def function(q, k, v, log_decay, state):
        options = {"initial_state": state, "segment_ids": ids, "backend": backend}
        return simple_gla(q, k, v, log_decay, **options)

    outputs, pull = jax.vjp(function, *values)
    return (*outputs, *pull(tuple(cotangents)))


@hypothesis.settings(max_examples=6, deadline=None)
@hypothesis.given(
    st.integers(1, 2), st.sampled_from([1, 7, 75]), st.integers(1, 3), st.integers(0, 99), st.booleans(), st.booleans()
)
def test_matches_the_recurrence_in_float64(batch, length, heads, seed, segments, strong):
    values, cotangents, ids = _inputs(batch, length, heads, 8, 5, seed)
    if strong:
        values[3] *= 30.0
    ids = ids if segments else None
    with jax.enable_x64(True):
        wide = [[np.asarray(x, np.float64) for x in xs] for xs in (values, cotangents)]
        expected = [np.asarray(x) for x in _run("reference", *wide, ids)]
    # The decay's gradient is the difference of two such sums, which may all but cancel.
    summed = np.linalg.norm(np.sum(np.abs(values[0] * expected[2]), axis=-1))
    floors = [1e-6, 1e-6, 1e-6, 1e-6, 1e-6, summed, 1e-6]
    for name, value, right, floor in zip(NAMES, _run("xla", values, cotangents, ids), expected, floors, strict=True):
        assert relative_error(value, right, floor) <= 1e-5, name


def test_a_constant_decay_is_lightning():
    (q, k, v, _, state), _, ids = _inputs(2, 50, 3, 8, 5, 0)
    constant = jnp.broadcast_to(-slopes(3), q.shape[:3])
    options = {"initial_state": state, "segment_ids": ids, "backend": "xla"}
    results = simple_gla(q, k, v, constant, **options)
    for value, right in zip(results, lightning_attention(q, k, v, slopes(3), **options), strict=True):
        assert relative_error(value, right) <= 1e-6


def test_a_wrong_shape_is_named():
    (q, k, v, log_decay, _), _, _ = _inputs(2, 9, 3, 8, 5, 0)
    with pytest.raises(ValueError, match="log_decay_BTH has shape"):
        simple_gla(q, k, v, log_decay[:, :, :1])
    assert "xla" in api.BACKENDS
