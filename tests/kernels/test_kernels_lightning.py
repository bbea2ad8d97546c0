"""The contract of the Lightning recurrence, for every backend, against a float64 recurrence."""

import functools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from kernels_pallas.lightning import api, lightning_attention, lightning_decode_step, slopes, xla
from kernels_pallas.lightning.recurrence import Passes, backend_function
from kernels_pallas.selfcheck import relative_error

BACKENDS = ("reference", "xla")  # those that run anywhere; the others have files of their own
FLOAT32, BFLOAT16 = 1e-5, 4e-3
NAMES = ("q", "k", "v", "initial_state")


def _inputs(shape, seed=0, dtype=np.float32):
    batch, length, heads, width, out = shape
    rng = np.random.default_rng(seed)
    sizes = [(batch, length, heads, width)] * 2 + [(batch, length, heads, out), (batch, heads, width, out)]
    values = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    cotangents = [rng.standard_normal(size).astype(np.float32) for size in sizes[2:]]
    if dtype != np.float32:
        values[:3] = [np.asarray(x.astype(dtype)) for x in values[:3]]
        cotangents[0] = cotangents[0].astype(dtype)
    return values, cotangents


def _segments(shape, seed=0):
    """Runs of a few ids with padding in front, between and behind."""
    rng = np.random.default_rng(seed)
    ids = np.cumsum(rng.random(shape[:2]) < 0.06, axis=1)
    ids[rng.random(shape[:2]) < 0.1] = -1
    if shape[1] > 4:
        ids[0, :3], ids[-1, -3:] = -1, -2
    return ids.astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(backend, precision, values, cotangents, segment_ids):
    def function(q, k, v, initial_state):
        options = {"initial_state": initial_state, "segment_ids": segment_ids, "precision": precision}
        return lightning_attention(q, k, v, slopes(q.shape[2]), backend=backend, **options)

    outputs, pull = jax.vjp(function, *values)
    return (*outputs, *pull(tuple(cotangents)))


def _oracle(values, cotangents, segment_ids):
    with jax.enable_x64(True):
        wide = [[np.asarray(x, np.float64) for x in xs] for xs in (values, cotangents)]
        return [np.asarray(x) for x in _run("reference", "default", *wide, segment_ids)]


def _assert_close(results, expected, tolerance):
    for name, value, right in zip(("o", "state", *("d " + n for n in NAMES)), results, expected, strict=True):
        error = relative_error(value, right)
        assert error <= tolerance, f"{name}: {error:.2e}"


def _recurrence(q, k, v, decay_slopes, scale, state, segment_ids):
    """An independent float64 recurrence in numpy."""
    out, state = np.zeros(v.shape), state.astype(np.float64).copy()
    for b in range(q.shape[0]):
        last = None
        for t in range(q.shape[1]):
            if segment_ids[b, t] < 0:
                continue
            if last is not None and last != segment_ids[b, t]:
                state[b] = 0
            last = segment_ids[b, t]
            for h in range(q.shape[2]):
                state[b, h] = np.exp(-float(decay_slopes[h])) * state[b, h] + np.outer(k[b, t, h], v[b, t, h])
                out[b, t, h] = scale * q[b, t, h] @ state[b, h]
    return out, state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_matches_a_recurrence_in_numpy(backend, scale):
    shape = (2, 70, 3, 8, 6)
    (q, k, v, state), _ = _inputs(shape)
    ids = _segments(shape, 1)
    results = lightning_attention(
        q, k, v, slopes(3), scale=scale, initial_state=state, segment_ids=jnp.asarray(ids), backend=backend
    )
    wide = [x.astype(np.float64) for x in (q, k, v)]
    expected = _recurrence(*wide, slopes(3), 8**-0.5 if scale is None else scale, state, ids)
    for value, right in zip(results, expected, strict=True):
        assert relative_error(value, right) <= FLOAT32
    assert not np.asarray(results[0])[ids < 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 3, 8, 8), (2, 75, 3, 8, 5), (1, 128, 1, 16, 16), (1, 200, 4, 32, 32)])
def test_values_and_gradients(backend, shape, segmented):
    values, cotangents = _inputs(shape)
    ids = _segments(shape) if segmented else None
    _assert_close(_run(backend, "default", values, cotangents, ids), _oracle(values, cotangents, ids), FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.given(data=st.data())
def test_any_segments(backend, data):
    shape = (2, 75, 3, 8, 5)
    runs = st.lists(st.tuples(st.sampled_from([-3, -1, 0, 1, 7]), st.integers(1, 40)), min_size=1, max_size=8)
    rows = []
    for _ in range(2):
        row = np.concatenate([np.full(n, i) for i, n in data.draw(runs)])
        rows.append(np.pad(row, (0, 75), constant_values=-1)[:75])
    values, cotangents = _inputs(shape, 3)
    ids = np.stack(rows).astype(np.int32)
    _assert_close(_run(backend, "default", values, cotangents, ids), _oracle(values, cotangents, ids), FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_alone_keeps_the_state(backend):
    shape = (2, 75, 3, 8, 5)
    values, cotangents = _inputs(shape)
    ids = np.full(shape[:2], -1, np.int32)
    o, state, dq, dk, dv, dstate = _run(backend, "default", values, cotangents, ids)
    assert not any(np.any(x) for x in (o, dq, dk, dv))
    np.testing.assert_array_equal(state, values[3])
    np.testing.assert_array_equal(dstate, cotangents[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("segmented", [False, True])
def test_bfloat16(backend, segmented):
    shape = (2, 150, 2, 64, 64)
    values, cotangents = _inputs(shape, dtype=jnp.bfloat16)
    ids = _segments(shape) if segmented else None
    expected = _oracle(values, cotangents, ids)
    results = _run(backend, "default", values, cotangents, ids)
    assert results[0].dtype == results[2].dtype == jnp.bfloat16 and results[1].dtype == jnp.float32
    _assert_close(results, expected, BFLOAT16)
    high = _run(backend, "high", values, cotangents, ids)
    assert relative_error(high[1], expected[1]) <= FLOAT32
    _assert_close(high, expected, 2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("at", [1, 70])
def test_two_halves_with_the_carried_state(backend, at):
    shape = (2, 150, 3, 8, 8)
    (q, k, v, state), _ = _inputs(shape)
    ids = jnp.asarray(np.where(np.arange(150) < 100, 4, -1) * np.ones((2, 1)), jnp.int32)
    whole, end = lightning_attention(q, k, v, slopes(3), initial_state=state, segment_ids=ids, backend=backend)
    parts = []
    for part in (slice(None, at), slice(at, None)):
        o, state = lightning_attention(
            q[:, part], k[:, part], v[:, part], slopes(3), initial_state=state, segment_ids=ids[:, part],
            backend=backend,
        )  # fmt: skip
        parts.append(o)
    assert relative_error(np.concatenate(parts, 1), whole) <= FLOAT32
    assert relative_error(state, end) <= FLOAT32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["plain", "carry"])
def test_golden(backend, case, shared):
    path = shared / "golden" / "c_recurrence_grads"
    golden, meta = load_file(f"{path}.safetensors"), json.loads(path.with_suffix(".json").read_text())
    carry = case == "carry"

    def function(q, k, v, state):
        decay_slopes = -golden["log_decay"]
        state = state if carry else None
        return lightning_attention(q, k, v, decay_slopes, scale=meta["scale"], initial_state=state, backend=backend)

    @jax.jit
    def run(do, dstate, *inputs):
        outputs, pull = jax.vjp(function, *inputs)
        return (*outputs, *pull((do, dstate)))

    dstate = golden["in.wS"] if carry else np.zeros_like(golden["in.wS"])
    results = run(golden["in.w"], dstate, *(golden["in." + name] for name in ("q", "k", "v", "h0")))
    names = ["o", "final_state", "dq", "dk", "dv", "dh0"][: 6 if carry else 5]
    for name, value in zip(names, results, strict=False):
        right = golden[f"{case}.{name}"]
        np.testing.assert_allclose(value, right, meta["suggested_rtol"], meta["suggested_atol"], err_msg=name)
        assert relative_error(value, right) <= FLOAT32, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_steep_and_flat_slopes_stay_finite(backend):
    (q, k, v, state), (do, dstate) = _inputs((1, 300, 2, 8, 8))

    def function(q, k, v, state):
        return lightning_attention(q, k, v, jnp.asarray([30.0, 0.0]), initial_state=state, backend=backend)

    (o, end), pull = jax.vjp(function, q, k, v, state)
    for x in (o, end, *pull((jnp.asarray(do), jnp.asarray(dstate)))):
        assert np.isfinite(x).all()
    np.testing.assert_allclose(end[0, 1], state[0, 1] + k[0, :, 1].T @ v[0, :, 1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(end[0, 0], np.outer(k[0, -1, 0], v[0, -1, 0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slopes_get_no_gradient(backend):
    (q, k, v, _), _ = _inputs((1, 9, 3, 8, 8))
    gradient = jax.grad(lambda s: lightning_attention(q, k, v, s, backend=backend)[0].sum())(jnp.asarray(slopes(3)))
    assert not np.any(gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inside_shard_map(backend):
    shape = (2, 70, 4, 8, 8)
    (q, k, v, _), (do, _) = _inputs(shape)
    ids = _segments(shape)

    def gradient(q, k, v, decay_slopes, ids):
        def loss(q, k, v):
            return jnp.sum(do_part * lightning_attention(q, k, v, decay_slopes, segment_ids=ids, backend=backend)[0])

        do_part = q * 0 + 1
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split, by_head, by_row = (jax.P("data", None, "tensor"), jax.P("tensor"), jax.P("data"))
    sharded = jax.jit(
        jax.shard_map(gradient, mesh=mesh, in_specs=(split, split, split, by_head, by_row), out_specs=split)
    )
    for got, right in zip(sharded(q, k, v, slopes(4), ids), gradient(q, k, v, slopes(4), ids), strict=True):
        assert relative_error(got, right) <= FLOAT32


def test_decode_steps_follow_the_sequence():
    shape = (3, 12, 3, 8, 5)
    (q, k, v, state), _ = _inputs(shape)
    ids = np.zeros(shape[:2], np.int32)
    ids[0, 4:7], ids[2] = -1, -1
    expected, end = lightning_attention(q, k, v, slopes(3), initial_state=state, segment_ids=jnp.asarray(ids))
    start = state
    for t in range(shape[1]):
        o, state = lightning_decode_step(
            q[:, t], k[:, t], v[:, t], slopes(3), state, valid_B=jnp.asarray(ids[:, t] >= 0)
        )
        np.testing.assert_allclose(o, expected[:, t], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, end, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(state[2], start[2])
    o, _ = lightning_decode_step(*(x[:, 0].astype(jnp.bfloat16) for x in (q, k, v)), slopes(3), state, scale=1.0)
    assert o.dtype == jnp.bfloat16 and state.dtype == jnp.float32


def test_a_donated_state_is_updated_in_place():
    q, state = jnp.ones((2, 3, 8)), jnp.ones((2, 3, 8, 8))
    step = jax.jit(lambda q, state: lightning_decode_step(q, q, q, slopes(3), state), donate_argnums=1)
    assert step.lower(q, state).compile().memory_analysis().alias_size_in_bytes == state.nbytes


def test_slopes_of_any_number_of_heads():
    np.testing.assert_allclose(slopes(4), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])
    np.testing.assert_allclose(slopes(16), [2.0 ** (-h / 2) for h in range(1, 17)], rtol=1e-6)
    np.testing.assert_allclose(slopes(6), [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    assert slopes(1).dtype == np.float32 and slopes(1)[0] == 2.0**-8
    with pytest.raises(ValueError, match="num_heads is 0"):
        slopes(0)


@pytest.mark.parametrize("chunk", [8, 16, 50, 128])
def test_the_chunk_does_not_change_the_result(chunk):
    shape = (2, 75, 3, 8, 5)
    (q, k, v, state), _ = _inputs(shape)
    options = {"slopes_H": slopes(3), "scale": 1.0, "initial_state": state, "segment_ids": _segments(shape)}
    expected = api.BACKENDS["reference"].function(q, k, v, **options)
    passes = Passes(*(functools.partial(x, chunk=chunk) for x in (xla.forward, xla.backward)))
    results = backend_function(passes)(q, k, v, **options)
    for value, right in zip(results, expected, strict=True):
        assert relative_error(value, right) <= FLOAT32


def test_mistakes_are_named():
    (q, k, v, state), _ = _inputs((2, 9, 3, 8, 5))
    with pytest.raises(ValueError, match="repeat K and V heads"):
        lightning_attention(q, k[:, :, :1], v[:, :, :1], slopes(3))
    with pytest.raises(ValueError, match="q has 3 heads"):
        lightning_attention(q, k, v, slopes(4))
    with pytest.raises(ValueError, match="initial_state has shape"):
        lightning_attention(q, k, v, slopes(3), initial_state=state[:1])
    with pytest.raises(ValueError, match="segment_ids have shape"):
        lightning_attention(q, k, v, slopes(3), segment_ids=jnp.zeros((2, 8), jnp.int32))
    with pytest.raises(ValueError, match="precision is 'low'"):
        lightning_attention(q, k, v, slopes(3), precision="low")
    with pytest.raises(ValueError, match="known: auto, tpu, gpu, jax-triton, xla, reference"):
        lightning_attention(q, k, v, slopes(3), backend="cuda")
    with pytest.raises(ValueError, match="float16"):
        lightning_attention(*(x.astype(np.float16) for x in (q, k, v)), slopes(3), backend="xla")
