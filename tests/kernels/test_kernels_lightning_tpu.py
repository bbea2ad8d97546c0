"""The Lightning recurrence's TPU kernels, interpreted on a CPU: the contract, and memory that was never written."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from lightning_contract import BFLOAT16, FLOAT32, check, inputs, segments

from kernels_pallas.lightning import lightning_attention, slopes, tpu
from kernels_pallas.lightning.recurrence import backend_function

POISONED = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
FUNCTION = functools.partial(tpu.BACKEND.function, interpret=True)


def _function(*blocks, interpret=True):
    """The backend with few chunks a grid step, so that short rows take several."""
    return functools.partial(backend_function(tpu.passes(tpu.Blocks(*blocks))), interpret=interpret)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 3, 32, 32), (2, 75, 3, 32, 64), (1, 256, 1, 64, 64), (1, 300, 5, 128, 128)])
def test_values_and_gradients(shape, segmented, gated):
    ids = segments(shape) if segmented else None
    check(FUNCTION, shape, segment_ids=ids, gated=gated, tolerance=FLOAT32)


@pytest.mark.parametrize("length", [512, 513, 700])
@pytest.mark.parametrize("segmented", [False, True])
def test_several_grid_steps(length, segmented):
    """Whole steps; a last one with a single token; a last one with an empty chunk. Each of two groups."""
    shape = (1, length, 2, 32, 32)
    ids = segments(shape, runs=0.01) if segmented else None
    check(_function(2, 1), shape, segment_ids=ids, tolerance=FLOAT32)


@hypothesis.given(data=st.data())
def test_any_segments(data):
    shape = (2, 275, 2, 32, 32)
    runs = st.lists(st.tuples(st.sampled_from([-3, -1, 0, 1, 7]), st.integers(1, 140)), min_size=1, max_size=8)
    rows = []
    for _ in range(2):
        row = np.concatenate([np.full(n, i) for i, n in data.draw(runs)])
        rows.append(np.pad(row, (0, 275), constant_values=-1)[:275])
    check(FUNCTION, shape, segment_ids=np.stack(rows).astype(np.int32), tolerance=FLOAT32)


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("segmented", [False, True])
def test_bfloat16(width, segmented):
    shape = (2, 150, 2, width, width)
    ids = segments(shape) if segmented else None
    check(FUNCTION, shape, dtype=jnp.bfloat16, segment_ids=ids, tolerance=BFLOAT16)
    check(FUNCTION, shape, dtype=jnp.bfloat16, segment_ids=ids, precision="high", tolerance=FLOAT32)


@pytest.mark.parametrize("segmented", [False, True])
def test_memory_beyond_the_end_is_never_read_into_a_result(segmented):
    shape = (1, 139, 2, 32, 32)
    ids = segments(shape) if segmented else None
    check(_function(1, 1, interpret=POISONED), shape, segment_ids=ids, tolerance=FLOAT32)


def test_padding_may_hold_anything():
    shape = (2, 150, 2, 32, 32)
    (q, k, v, state, _), _ = inputs(shape)
    ids = segments(shape)
    options = {"slopes_H": slopes(2), "scale": 1.0, "initial_state": state, "segment_ids": ids}
    clean, end = FUNCTION(q, k, v, **options)
    for x in (q, k, v):
        x[ids < 0] = np.nan
    dirty, dirty_end = FUNCTION(q, k, v, **options)
    np.testing.assert_array_equal(clean, dirty)
    np.testing.assert_array_equal(end, dirty_end)


@pytest.mark.parametrize("segmented", [False, True])
def test_steep_and_flat_slopes_stay_finite(segmented):
    (q, k, v, state, _), _ = inputs((1, 300, 2, 32, 32))
    ids = np.zeros((1, 300), np.int32) if segmented else None
    options = {"slopes_H": jnp.asarray([30.0, 0.0]), "scale": 1.0, "initial_state": state, "segment_ids": ids}
    o, end = FUNCTION(q, k, v, **options)
    assert np.isfinite(o).all()
    np.testing.assert_allclose(end[0, 1], state[0, 1] + k[0, :, 1].T @ v[0, :, 1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(end[0, 0], np.outer(k[0, -1, 0], v[0, -1, 0]), rtol=1e-5, atol=1e-6)


def test_refuses_what_it_cannot_run():
    (q, k, v, _, _), _ = inputs((1, 9, 2, 8, 8))
    with pytest.raises(ValueError, match="it runs on TPU and this is cpu"):
        lightning_attention(q, k, v, slopes(2), backend="tpu")
