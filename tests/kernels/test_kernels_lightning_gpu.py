"""The recurrence's GPU kernels: the contract, interpreted on a CPU and (marked `gpu`) on a GPU at real sizes."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lightning_contract import BFLOAT16, FLOAT32, check, inputs, run, segments

from kernels_pallas.lightning import gpu, lightning_attention, slopes, xla
from kernels_pallas.lightning.gpu_kernels import Tiles
from kernels_pallas.lightning.recurrence import Passes, backend_function
from kernels_pallas.selfcheck import relative_error

SMALL = gpu.Plan(Tiles(16, 16, 4, 2), Tiles(16, 16, 4, 2))
PASSES = Passes(functools.partial(gpu.forward, tiles=SMALL), functools.partial(gpu.backward, tiles=SMALL))
FUNCTION = functools.partial(backend_function(PASSES), interpret=True)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """Rows of few chunks are cut into segments and pieces all the same."""
    monkeypatch.setattr(gpu, "multiprocessors", lambda: 12)
    monkeypatch.setattr(gpu, "MIN_CHUNKS", 1)
    monkeypatch.setattr(gpu, "PIECE_CHUNKS", 1)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 3, 32, 32), (2, 75, 3, 32, 16), (1, 96, 1, 16, 32)])
def test_values_and_gradients(shape, segmented, gated):
    ids = segments(shape) if segmented else None
    check(FUNCTION, shape, segment_ids=ids, gated=gated, tolerance=FLOAT32)


@pytest.mark.parametrize("widths", [(16, 64), (64, 16)])
def test_keys_and_values_of_different_widths(widths):
    """With the tiles that a GPU would get."""
    check(functools.partial(gpu.BACKEND.function, interpret=True), (1, 130, 1, *widths), tolerance=FLOAT32)


@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(data=st.data())
def test_any_segments(data):
    runs = st.lists(st.tuples(st.sampled_from([-3, -1, 0, 1, 7]), st.integers(1, 50)), min_size=1, max_size=6)
    row = np.concatenate([np.full(n, i) for i, n in data.draw(runs)])
    ids = np.pad(row, (0, 75), constant_values=-1)[None, :75].astype(np.int32)
    check(FUNCTION, (1, 75, 2, 16, 16), segment_ids=ids, tolerance=FLOAT32)


@pytest.mark.parametrize("segmented", [False, True])
def test_bfloat16(segmented):
    shape = (2, 64, 2, 32, 32)
    ids = segments(shape) if segmented else None
    check(FUNCTION, shape, dtype=jnp.bfloat16, segment_ids=ids, tolerance=BFLOAT16)
    check(FUNCTION, shape, dtype=jnp.bfloat16, segment_ids=ids, precision="high", tolerance=FLOAT32)


def test_a_short_memory_leaves_out_what_it_says(monkeypatch):
    monkeypatch.setattr(gpu, "multiprocessors", lambda: 3)  # segments of four chunks
    (q, k, v, state, _), _ = inputs((1, 192, 1, 16, 16))
    options = {"slopes_H": slopes(1) * 32, "scale": 1.0, "initial_state": state}
    exact, _ = FUNCTION(q, k, v, **options)
    errors = []
    for bits in (2.0, 10.0, 24.0):
        short, _ = FUNCTION(q, k, v, short_memory=bits, **options)
        errors.append(relative_error(short, exact))
        assert errors[-1] <= 2.0 ** (2 - bits)
    assert errors[0] > 1e-4  # or the option would do nothing
    with pytest.raises(ValueError, match="short_memory is 0"):
        lightning_attention(q, k, v, slopes(1), short_memory=0)


@pytest.mark.parametrize("segmented", [False, True])
def test_what_is_left_out_changes_no_bit(monkeypatch, segmented):
    """And a piece that is left out is never read."""
    shape = (1, 128, 2, 16, 16)
    monkeypatch.setattr(gpu, "multiprocessors", lambda: 4)
    (q, k, v, state, _), (do, dstate) = inputs(shape)
    ids = segments(shape) if segmented else None

    def local_states(layout, tiles, rates, skip, *operands):
        local = gpu.PALLAS.local_states(layout, tiles, rates, skip, *operands)
        return jnp.where((skip == layout.per_segment // layout.pieces)[..., None, None], jnp.nan, local)

    def gradients(bits):
        monkeypatch.setattr(gpu, "FLOAT32_BITS", bits)
        poisoned = gpu.PALLAS._replace(local_states=local_states)
        passes = Passes(*(functools.partial(f, tiles=SMALL, kernels=poisoned) for f in (gpu.forward, gpu.backward)))
        options = {"slopes_H": np.array([0.01, 3.0]), "scale": 1.0, "segment_ids": ids, "interpret": True}
        run = functools.partial(backend_function(passes), **options)
        outputs, pull = jax.vjp(lambda q, k, v, state: run(q, k, v, initial_state=state), q, k, v, state)
        return *outputs, *pull((jnp.asarray(do), jnp.asarray(dstate)))

    for x, right in zip(gradients(150.0), gradients(np.inf), strict=True):
        np.testing.assert_array_equal(x, right)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("width", [32, 64, 128, 256])
def test_on_a_gpu(width, segmented, gated, monkeypatch):
    monkeypatch.undo()
    shape = (2, 777, 3, width, width)
    ids = segments(shape, runs=0.01) if segmented else None
    function = gpu.BACKEND.function
    check(function, shape, dtype=jnp.bfloat16, segment_ids=ids, gated=gated, tolerance=BFLOAT16 if not gated else 8e-3)
    check(function, shape, precision="high", segment_ids=ids, gated=gated, tolerance=FLOAT32)


@pytest.mark.gpu
def test_long_rows_on_a_gpu_match_the_portable_backend(monkeypatch):
    monkeypatch.undo()
    values, cotangents = inputs((1, 32768, 16, 128, 128), dtype=jnp.bfloat16)
    got = run(gpu.BACKEND.function, "default", False, values, cotangents, None)
    wide = [[x.astype(np.float32) for x in xs] for xs in (values, cotangents)]
    for x, right in zip(got[:5], run(xla.BACKEND.function, "high", False, *wide, None), strict=False):
        assert relative_error(x, right) <= BFLOAT16


@pytest.mark.gpu
def test_beyond_two_to_the_31_elements(monkeypatch):
    monkeypatch.undo()
    length, heads, window = 2**20 + 64, 16, 16384
    q, k, v = (jax.random.normal(jax.random.key(i), (1, length, heads, 128), jnp.bfloat16) for i in range(3))
    whole, state = lightning_attention(q, k, v, slopes(heads), backend="gpu")
    # What lies further back than the window has decayed to exp(-64).
    last, end = lightning_attention(*(x[:, -window:] for x in (q, k, v)), slopes(heads), backend="gpu")
    assert relative_error(whole[:, -64:], last[:, -64:]) <= BFLOAT16
    assert relative_error(state, end) <= BFLOAT16
