"""The contract of softmax attention, for every backend, against float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import attention, cached_attention, xla
from kernels_pallas.selfcheck import relative_error

BACKENDS = CACHED_BACKENDS = ["reference", "xla"]  # those that run anywhere
FLOAT32, BFLOAT16 = 1e-5, 6e-3


def _inputs(batch, length, keys, heads, kv_heads, width, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    sizes = [(batch, length, heads, width)] + [(batch, keys, kv_heads, width)] * 2 + [(batch, length, heads, width)]
    return [rng.standard_normal(size).astype(np.float32).astype(dtype) for size in sizes]


def _segments(batch, length, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.cumsum(rng.random((batch, length)) < 0.05, axis=1)
    ids[rng.random((batch, length)) < 0.1] = -1
    if length > 4:
        ids[0, :3], ids[-1, -3:] = -1, -2
    return ids.astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(backend, causal, scale, q, k, v, do, segment_ids, logit_scale):
    def function(q, k, v):
        options = {"causal": causal, "segment_ids": segment_ids, "scale": scale, "logit_scale_T": logit_scale}
        return attention(q, k, v, backend=backend, **options)

    o, pull = jax.vjp(function, q, k, v)
    return (o, *pull(do))


def _oracle(causal, scale, arrays, segment_ids, logit_scale):
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in arrays]
        return [np.asarray(x) for x in _run("reference", causal, scale, *wide, segment_ids, logit_scale)]


def _assert_close(results, expected, tolerance):
    for name, value, right in zip(("o", "dq", "dk", "dv"), results, expected, strict=True):
        # A document of one token has dq = 0: measured against gradients of order 1.
        error = relative_error(value, right, floor=1.0)
        assert error <= tolerance, f"{name}: {error:.2e}"


def _softmax_in_numpy(q, k, v, seen_BTS, scale):
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(seen_BTS[b, t])
        if keys.size:
            scores = scale * k[b, keys, h // group].astype(np.float64) @ q[b, t, h].astype(np.float64)
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ v[b, keys, h // group] / weights.sum()
    return out


@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_numpy(backend):
    q, k, v, _ = _inputs(2, 23, 23, 6, 2, 8)
    ids = _segments(2, 23)
    growth = np.linspace(1, 2, 23).astype(np.float32)
    o = attention(q, k, v, segment_ids=jnp.asarray(ids), logit_scale_T=jnp.asarray(growth), backend=backend)
    seen = (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, :, None] & np.tri(23, dtype=bool)
    expected = _softmax_in_numpy(q * growth[:, None, None], k, v, seen, 8**-0.5)
    assert relative_error(o, expected) <= FLOAT32
    assert not np.asarray(o)[ids < 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 3, 3, 8), (2, 75, 75, 3, 1, 8), (1, 600, 600, 4, 2, 16)])
def test_values_and_gradients(backend, shape, causal, segmented):
    arrays = _inputs(*shape)
    ids = _segments(*shape[:2]) if segmented else None
    growth = np.linspace(0.5, 2, shape[1]).astype(np.float32)
    if segmented:
        growth = np.broadcast_to(growth, shape[:2])
    results = _run(backend, causal, 0.3, *arrays, ids, growth)
    _assert_close(results, _oracle(causal, 0.3, arrays, ids, growth), FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_of_another_length(backend):
    arrays = _inputs(2, 30, 301, 4, 2, 8)
    results = _run(backend, False, None, *arrays, None, None)
    _assert_close(results, _oracle(False, None, arrays, None, None), FLOAT32)


@pytest.mark.parametrize("blocks", [(16, 64), (64, 16), (75, 10)])
def test_blocks_do_not_change_the_result(blocks):
    *arrays, do = _inputs(2, 75, 75, 4, 2, 8)
    ids = _segments(2, 75)

    @jax.jit
    def run(q, k, v):
        options = {"causal": True, "segment_ids": ids, "scale": 0.4, "logit_scale": None, "blocks": blocks}
        o, pull = jax.vjp(lambda q, k, v: xla.attention(q, k, v, **options), q, k, v)
        return (o, *pull(jnp.asarray(do)))

    _assert_close(run(*arrays), _oracle(True, 0.4, (*arrays, do), ids, None), FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.given(data=st.data())
def test_any_segments(backend, data):
    runs = st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=1, max_size=8)
    rows = []
    for _ in range(2):
        row = np.concatenate([np.full(n, i if real else -1) for i, (real, n) in enumerate(data.draw(runs))])
        rows.append(np.pad(row, (0, 75), constant_values=-1)[:75])
    arrays, ids = _inputs(2, 75, 75, 3, 1, 8), np.stack(rows).astype(np.int32)
    results = _run(backend, True, None, *arrays, ids, None)
    _assert_close(results, _oracle(True, None, arrays, ids, None), FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing_are_zero_with_zero_gradients(backend):
    arrays = _inputs(2, 75, 75, 3, 1, 8)
    for x in _run(backend, True, None, *arrays, np.full((2, 75), -1, np.int32), None):
        np.testing.assert_array_equal(x, np.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_stay_finite(backend):
    q, k, v, do = _inputs(1, 75, 75, 2, 2, 8)
    arrays = (q * 100, k * 100, v, do)
    results = _run(backend, True, None, *arrays, None, None)
    assert all(np.isfinite(x).all() for x in results)
    assert relative_error(results[0], _oracle(True, None, arrays, None, None)[0]) <= 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend):
    arrays = _inputs(2, 300, 300, 4, 2, 64, dtype=jnp.bfloat16)
    growth, ids = np.linspace(1, 2, 300).astype(np.float32), _segments(2, 300)
    results = _run(backend, True, None, *arrays, ids, growth)
    assert all(x.dtype == jnp.bfloat16 for x in results)
    _assert_close(results, _oracle(True, None, arrays, ids, growth), BFLOAT16)


@pytest.mark.parametrize("backend", CACHED_BACKENDS)
@pytest.mark.parametrize("length", [1, 5, 300])
def test_cache(backend, length):
    slots = 333
    q, k, v, _ = _inputs(3, length, slots, 6, 2, 8)
    rng = np.random.default_rng(1)
    positions = np.sort(rng.integers(0, 310, (3, length)), axis=1).astype(np.int32)
    positions[1, :1], positions[2] = -1, -1
    growth = rng.uniform(1, 2, (3, length)).astype(np.float32)
    o = cached_attention(q, k, v, jnp.asarray(positions), logit_scale_BT=jnp.asarray(growth), backend=backend)
    seen = np.arange(slots) <= positions[:, :, None]
    expected = _softmax_in_numpy(q * growth[..., None, None], k, v, seen, 8**-0.5)
    assert relative_error(o, expected) <= FLOAT32
    assert not np.asarray(o)[positions < 0].any()


def test_blocks_above_the_diagonal_are_not_visited():
    block = 16
    q, k, v, do = _inputs(1, 4 * block, 4 * block, 2, 2, 8)
    poisoned = v.copy()
    poisoned[:, 2 * block :] = np.nan  # visited and masked, it would still make 0 * NaN
    options = {"causal": True, "segment_ids": None, "scale": 1.0, "logit_scale": None, "blocks": (block, block)}
    o, pull = jax.vjp(lambda q, k: xla.attention(q, k, poisoned, **options), q, k)
    assert np.isfinite(o[:, : 2 * block]).all() and np.isnan(o[:, 2 * block :]).all()
    dq, _ = pull(jnp.asarray(do))
    assert np.isfinite(dq[:, : 2 * block]).all()


def test_the_cache_is_read_up_to_the_largest_position_only():
    q, k, v, _ = _inputs(2, 1, 100, 2, 2, 8)
    poisoned = v.copy()
    poisoned[:, 32:] = np.nan
    positions = jnp.asarray([[3], [31]], jnp.int32)
    o = xla.cached_attention(q, k, poisoned, positions, scale=1.0, logit_scale=None, blocks=(1, 16))
    np.testing.assert_allclose(o, cached_attention(q, k, v, positions, scale=1.0), rtol=1e-5, atol=1e-6)


def test_inside_shard_map():
    q, k, v, _ = _inputs(2, 75, 75, 4, 2, 8)
    ids = _segments(2, 75)

    def gradient(q, k, v, ids):
        def loss(q, k, v):
            return jnp.sum(xla.attention(q, k, v, segment_ids=ids, **options) ** 2)

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    options = {"causal": True, "scale": 0.3, "logit_scale": None, "blocks": (32, 32)}
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split, by_row = jax.P("data", None, "tensor"), jax.P("data")
    sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(split, split, split, by_row), out_specs=split))
    for got, right in zip(sharded(q, k, v, ids), gradient(q, k, v, ids), strict=True):
        assert relative_error(got, right) <= FLOAT32


def test_mistakes_are_named():
    q, k, v, _ = _inputs(2, 9, 9, 3, 1, 8)
    with pytest.raises(ValueError, match="must divide"):
        attention(q, np.repeat(k, 2, 2), np.repeat(v, 2, 2))
    with pytest.raises(ValueError, match="q has 4 tokens and k 9"):
        attention(q[:, :4], k, v)
    with pytest.raises(ValueError, match="segment_ids have shape"):
        attention(q, k, v, segment_ids=jnp.zeros((1, 9), jnp.int32))
    with pytest.raises(ValueError, match="logit_scale_T has shape"):
        attention(q, k, v, logit_scale_T=jnp.ones(8))
    with pytest.raises(ValueError, match="q_positions_BT has shape"):
        cached_attention(q, k, v, jnp.zeros((2, 8), jnp.int32))
    with pytest.raises(ValueError, match="known: auto, .*xla, reference"):
        attention(q, k, v, backend="flash")
