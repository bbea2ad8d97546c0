"""What every backend of softmax attention owes, checked against the reference in float64.

The functions take a backend's function (`Backend.function`, an interpreter or blocks bound to it by the caller), so
that one contract serves the interpreters on a CPU and the real thing elsewhere. Errors are norms relative to the
reference's.
"""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import reference
from kernels_pallas.selfcheck import relative_error

FLOAT32, BFLOAT16 = 1e-5, 4e-3


def random_inputs(batch, length, keys, heads, kv_heads, width, seed=0, dtype=np.float32):
    """q, k, v and the cotangent of o: standard normal, in numpy."""
    rng = np.random.default_rng(seed)
    sizes = [(batch, length, heads, width)] + [(batch, keys, kv_heads, width)] * 2 + [(batch, length, heads, width)]
    return [rng.standard_normal(size).astype(np.float32).astype(dtype) for size in sizes]


def random_segments(batch, length, seed=0, new_document=0.05, padding=0.1):
    """Documents with padding before, in and after them."""
    rng = np.random.default_rng(seed)
    ids = np.cumsum(rng.random((batch, length)) < new_document, axis=1)
    ids[rng.random((batch, length)) < padding] = -1
    if length > 4:
        ids[0, :3], ids[-1, -3:] = -1, -2
    return ids.astype(np.int32)


@st.composite
def segments(draw, batch, length):
    """Any rows of documents and padding."""
    runs = st.lists(st.tuples(st.booleans(), st.integers(1, length)), min_size=1, max_size=8)
    rows = []
    for _ in range(batch):
        row = np.concatenate([np.full(n, i if real else -1) for i, (real, n) in enumerate(draw(runs))])
        rows.append(np.pad(row, (0, length), constant_values=-1)[:length])
    return np.stack(rows).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def values_and_gradients(function, causal, scale, q, k, v, do, segment_ids, logit_scale):
    """o, dq, dk, dv."""
    options = {"causal": causal, "segment_ids": segment_ids, "scale": scale, "logit_scale": logit_scale}
    o, pull = jax.vjp(lambda q, k, v: function(q, k, v, **options), q, k, v)
    return (o, *pull(do))


def expected(causal, scale, arrays, segment_ids, logit_scale):
    """The same of the reference, in float64."""
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in arrays]
        results = values_and_gradients(reference.attention, causal, scale, *wide, segment_ids, logit_scale)
        return [np.asarray(x) for x in results]


def assert_close(results, expected, tolerance):
    # A document of one token has dq = dk = 0, each a difference of terms of dv's size: measured against gradients of
    # order 1, and against dv where there is nothing but such documents.
    floor = 1.0 if np.any(expected[1]) else max(1.0, float(np.linalg.norm(expected[3])))
    for name, value, right in zip(("o", "dq", "dk", "dv"), results, expected, strict=True):
        error = relative_error(value, right, floor)
        assert error <= tolerance, f"{name}: {error:.2e}"


def check(function, arrays, *, causal=True, scale=0.3, segment_ids=None, logit_scale=None, tolerance=FLOAT32):
    """Values and gradients; what is padding is exactly zero."""
    results = values_and_gradients(function, causal, scale, *arrays, segment_ids, logit_scale)
    assert [x.dtype for x in results] == [arrays[2].dtype, *(x.dtype for x in arrays[:3])]
    assert_close(results, expected(causal, scale, arrays, segment_ids, logit_scale), tolerance)
    if segment_ids is not None:
        for x in results[:2]:
            assert not np.asarray(x, np.float32)[segment_ids < 0].any()


def check_that_padding_gives_zeros(function, arrays):
    """Rows of padding only: zeros, and zero gradients."""
    ids = np.full(arrays[0].shape[:2], -1, np.int32)
    for x in values_and_gradients(function, True, 0.3, *arrays, ids, None):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.zeros(x.shape))


def check_that_large_scores_stay_finite(function, arrays):
    q, k, v, do = arrays
    arrays = (q * 100, k * 100, v, do)
    results = values_and_gradients(function, True, 0.3, *arrays, None, None)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in results)
    assert relative_error(results[0], expected(True, 0.3, arrays, None, None)[0]) <= 1e-2


def check_cached(function, arrays, positions, *, scale=0.3, logit_scale=None, tolerance=FLOAT32):
    """A cache with rows of different lengths, and queries that are padding (position -1)."""
    q, k, v = arrays[:3]
    o = jax.jit(functools.partial(function, scale=scale))(q, k, v, jnp.asarray(positions), logit_scale=logit_scale)
    assert o.dtype == v.dtype
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in (q, k, v)]
        right = reference.cached_attention(*wide, jnp.asarray(positions), scale=scale, logit_scale=logit_scale)
    assert relative_error(o, right) <= tolerance
    assert not np.asarray(o, np.float32)[positions < 0].any()


def check_that_parts_of_a_cache_merge(attend_cache, length):
    """A cache dealt out to two, each attended to alone, merged by their log-sum-exps; padding sees neither part."""
    q, k, v, _ = random_inputs(2, length, 96, 4, 2, 32)
    positions = np.random.default_rng(1).integers(0, 96, (2, length)).astype(np.int32)
    positions[0, 0], positions[1, 0] = -1, 0  # a query that sees nothing of the second part
    growth = np.linspace(1, 2, 2 * length, dtype=np.float32).reshape(2, length)
    options = {"scale": 0.3, "logit_scale": growth}
    parts = [
        attend_cache(q, k[:, i::2], v[:, i::2], jnp.asarray((positions - i) // 2), dtype=jnp.float32, **options)
        for i in range(2)
    ]
    log_sums = jnp.stack([log_sum for _, log_sum in parts])
    assert (np.asarray(log_sums)[1, positions == 0] < -1e29).all()
    shares = jax.nn.softmax(log_sums, axis=0)
    o = sum(share[..., None] * o for share, (o, _) in zip(shares, parts, strict=True))
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in (q, k, v)]
        right = reference.cached_attention(*wide, jnp.asarray(positions), **options)
    assert relative_error(o, right) <= FLOAT32
    assert not np.asarray(o)[positions < 0].any()


KEY_BLOCKS = slice(0, 48), slice(48, 96)


@functools.partial(jax.jit, static_argnums=0)
def _merged(attend_block, q, k, v, do, lasts, ids, key_ids):
    """Attention of 32 queries to two blocks of 48 keys, merged by their log-sum-exps, and its gradients.

    Also the log-sum-exps of both blocks together.
    """

    def function(q, k, v):
        parts = []
        for at, last in zip(KEY_BLOCKS, lasts, strict=True):
            options = {"segment_ids": ids, "key_segment_ids": key_ids[:, at], "scale": 0.3, "dtype": jnp.float32}
            parts.append(attend_block(q, k[:, at], v[:, at], last, **options))
        log_sums = jnp.stack([log_sum for _, log_sum in parts])
        log_sum = jax.nn.logsumexp(log_sums, axis=0)
        shares = jnp.exp(log_sums - log_sum)
        return sum(share[..., None] * o for share, (o, _) in zip(shares, parts, strict=True)), log_sum

    o, pull, log_sum = jax.vjp(function, q, k, v, has_aux=True)
    return (o, *pull(do)), log_sum


@functools.partial(jax.jit, static_argnums=0)
def _added(block_gradients, q, k, v, do, o, log_sum, lasts, ids, key_ids):
    """The same gradients as a ring makes them: from what is known of all keys, a block of keys at a time."""
    inner, found = jnp.sum(o * do, axis=-1), []
    for at, last in zip(KEY_BLOCKS, lasts, strict=True):
        options = {"segment_ids": ids, "key_segment_ids": key_ids[:, at], "scale": 0.3}
        found.append(block_gradients(q, k[:, at], v[:, at], do, log_sum, inner, last, **options))
    dq, dk, dv = zip(*found, strict=True)
    return sum(dq), jnp.concatenate(dk, axis=1), jnp.concatenate(dv, axis=1)


def check_that_blocks_merge(attend_block, block_gradients, q_start):
    """Blocks of a longer sequence, merged by their log-sum-exps, are attention to the whole of it; gradients too."""
    q, k, v, do = random_inputs(2, 32, 96, 4, 2, 32)
    key_ids = np.cumsum(np.arange(96) % 37 == 36)[None].repeat(2, 0).astype(np.int32)
    ids = key_ids[:, q_start : q_start + 32]
    seen = (np.arange(96) <= q_start + np.arange(32)[:, None]) & (ids[:, :, None] == key_ids[:, None])

    def plain(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.where(seen[:, None], 0.3 * jnp.einsum("bthd,bshd->bhts", q, k), -jnp.inf)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)

    with jax.enable_x64(True):
        o, pull = jax.vjp(plain, *(np.asarray(x, np.float64) for x in (q, k, v)))
        right = (o, *pull(jnp.asarray(do, jnp.float64)))
    ahead = (q_start + np.arange(32) - at.start for at in KEY_BLOCKS)
    lasts = tuple(np.clip(last, -1, 47)[None].astype(np.int32) for last in ahead)
    got, log_sum = _merged(attend_block, q, k, v, do, lasts, ids, key_ids)
    added = _added(block_gradients, q, k, v, do, got[0], log_sum, lasts, ids, key_ids)
    for found, wanted in zip((*got, *added), (*right, *right[1:]), strict=True):
        assert relative_error(found, wanted) <= FLOAT32
