"""A cache dealt out over seq: what is stored where, and attention to it is that of one device."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_cases import SHARDS, P, over_seq

from hypenet_jax.parallel.sequence import cache
from kernels_pallas.attention import reference
from kernels_pallas.selfcheck import relative_error

SPECS = {name: P(None, "seq") for name in ("k_cache", "v_cache")} | dict.fromkeys(("k", "v", "q", "positions"), P())


def on_shards(shards, split, q, k, v, positions):
    """Store the new tokens at their positions in an empty cache, and attend to it."""

    def run(axis, k_cache, v_cache, k, v, q, positions):
        k_cache, v_cache = (
            cache.stored(old, new, positions, axis_name=axis) for old, new in ((k_cache, k), (v_cache, v))
        )
        return cache.attention(q, k_cache, v_cache, positions, axis_name=axis, scale=0.3)

    def run_split(axis, k_cache, v_cache, k, v, q, positions):
        k_cache, v_cache = (
            cache.stored(old, new, positions, axis_name=axis) for old, new in ((k_cache, k), (v_cache, v))
        )
        mine = (jnp.split(x, shards, axis=1) for x in (q, positions))
        q, positions = (jnp.stack(x)[jax.lax.axis_index(axis)] for x in mine)
        return cache.attention(q, k_cache, v_cache, positions, axis_name=axis, scale=0.3, split=True)

    empty = np.zeros((2, 32, *k.shape[2:]), np.float32)
    operands = {"k_cache": empty, "v_cache": empty, "k": k, "v": v, "q": q, "positions": positions}
    out = P(None, "seq") if split else P()
    return over_seq(run_split if split else run, shards, operands, SPECS, out)


@settings(max_examples=10)
@given(lengths=st.tuples(st.integers(0, 8), st.integers(0, 8)), shards=st.sampled_from(SHARDS), split=st.booleans())
def test_rows_of_any_length(lengths, shards, split):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 8, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    positions = np.where(np.arange(8) < np.array(lengths)[:, None], np.arange(8), -1).astype(np.int32)
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in (q, k, v)]
        right = reference.cached_attention(*wide, jnp.asarray(positions), scale=0.3, logit_scale=None)
    got = on_shards(shards, split, q, k, v, positions)
    assert relative_error(got, right, 1e-6) <= 1e-5
    assert not np.asarray(got)[positions < 0].any()


def test_positions_are_dealt_out():
    new = np.arange(1, 9, dtype=np.float32).reshape(1, 8, 1, 1)
    positions = np.array([[0, 1, 2, 3, 4, -1, 5, -1]], np.int32)

    def run(axis, old, new, positions):
        return cache.stored(old, new, positions, axis_name=axis)

    specs = {"old": P(None, "seq"), "new": P(), "positions": P()}
    operands = {"old": np.zeros((1, 8, 1, 1), np.float32), "new": new, "positions": positions}
    stored = over_seq(run, 2, operands, specs, P(None, "seq"))
    assert np.asarray(stored).ravel().tolist() == [1, 3, 5, 0, 2, 4, 7, 0]
