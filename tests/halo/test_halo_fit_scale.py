"""The a of s_t: the grid's losses are the scaled model's own, and its minimum is found."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hypenet_jax as hn
from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.fit_scale import WIDEST, fit_scale, sharpest, vertex, widened
from hypenet_jax.halo.settings import FitScaleConfig

GRID = (3.0, 50.0, 1.5, 400.0)


@pytest.fixture(scope="module")
def student(tiny):
    model, params = hn.convert(*tiny, [0, 1], start="calibrated")
    return model.with_logits_scaling(77.0), params


@pytest.fixture(scope="module")
def fitted(student):
    windows = np.random.default_rng(6).integers(0, 31, (3, 41), dtype=np.int32)
    return windows, fit_scale(*student, windows, GRID, batch_size=2)


def direct(model, params, windows):
    logits = np.asarray(model.logits(params, windows[:, :-1]), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    return (log_z - np.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]).mean()


def test_every_loss_is_that_of_the_scaled_model(student, fitted):
    (model, params), (windows, found) = student, fitted
    # Random tokens like an unscaled network best, so the grid was followed upwards; its own points come first.
    assert found["grid"][:4] == sorted(GRID) and (found["length"], found["documents"]) == (40, 3)
    losses = found["loss"][:4]
    for a, loss in zip(sorted(GRID), losses, strict=True):
        assert loss == pytest.approx(direct(model.with_logits_scaling(a), params, windows), rel=1e-5)
    # Whatever scaling the model came with, "unscaled" is without.
    unscaled = direct(model.with_logits_scaling(None), params, windows)
    assert found["loss_unscaled"] == pytest.approx(unscaled, rel=1e-5)
    assert len({round(loss, 6) for loss in [*losses, unscaled]}) == 5


def test_a_is_the_vertex_of_the_grid(fitted):
    found = fitted[1]
    assert found["a"] == pytest.approx(vertex(found["grid"], found["loss"]), rel=1e-3)


def test_a_tolerance_takes_the_sharpest_a_that_the_loss_does_not_mind(student, fitted):
    windows, plain = fitted
    assert plain["best"] == plain["a"] and plain["tolerance"] == 0
    low, high = min(plain["loss"]), plain["loss"][0]
    found = fit_scale(*student, windows, GRID, batch_size=2, tolerance=(high - low) / 2)
    assert (found["best"], found["loss"]) == (plain["best"], plain["loss"])
    assert found["grid"][0] < found["a"] < found["best"]
    assert found["a"] == pytest.approx(sharpest(found["grid"], found["loss"], (high - low) / 2), rel=1e-3)
    # The network that is scaled by it loses what was allowed, up to the line between two points of the grid.
    model, params = student
    loss = direct(model.with_logits_scaling(found["a"]), params, windows)
    assert low < loss == pytest.approx((low + high) / 2, abs=0.3 * (high - low))


def test_the_sharpest_within_a_tolerance():
    grid, losses = [2.0, 8.0, 32.0, 128.0], [4.0, 2.0, 1.0, 1.5]
    assert sharpest(grid, losses, 0.0) == 32.0 and sharpest(grid, losses, 0.5) == pytest.approx(16.0)
    assert sharpest(grid, losses, 1.0) == pytest.approx(8.0) and sharpest(grid, losses, 2.0) == pytest.approx(4.0)
    assert sharpest(grid, losses, 3.0) == sharpest(grid, losses, 9.0) == 2.0
    # A dip beyond a rise that is too high does not count.
    assert sharpest(grid, [1.0, 5.0, 1.0, 2.0], 0.0) == 2.0
    assert sharpest(grid, [1.1, 5.0, 1.0, 2.0], 1.0) == pytest.approx(32 / 4**0.25)


@pytest.mark.parametrize("tolerance", [-0.01, math.inf, math.nan])
def test_a_tolerance_out_of_range_is_refused(tolerance):
    with pytest.raises(HypenetError, match=f"fit_scale.tolerance is {tolerance}; it must be a number of 0 or above"):
        FitScaleConfig(tolerance=tolerance)


@given(st.floats(0, 5), st.floats(0, 5), st.lists(st.floats(0, 9), min_size=3, max_size=7))
def test_more_tolerance_never_gives_a_larger_a(one, other, losses):
    grid = [3.0 * 2**i for i in range(len(losses))]
    small, large = (sharpest(grid, losses, tolerance) for tolerance in sorted((one, other)))
    assert grid[0] <= large <= small * (1 + 1e-12) <= grid[int(np.argmin(losses))] * (1 + 1e-9)


def test_the_best_of_the_grid_wins():
    grid = [2.0, 8.0, 32.0, 128.0]
    assert vertex(grid, [1.0, 2.0, 3.0, 4.0]) == 2.0
    assert vertex(grid, [4.0, 3.0, 2.0, 1.0]) == 128.0
    assert 2.0 < vertex(grid, [3.0, 1.0, 2.0, 0.99999 + 1]) < 32.0
    assert vertex(grid, [2.0, 1.0, 2.0, 3.0]) == pytest.approx(8.0)
    assert vertex(grid, [1.0, 1.0, 1.0, 1.0]) == 2.0
    # Flat on one side: the minimum lies between the two equal points.
    assert vertex(grid, [5.0, 1.0, 1.0, 5.0]) == pytest.approx(16.0)


@given(st.floats(math.log(2.5), math.log(4e5)))
def test_a_grid_that_ends_before_the_minimum_is_followed(center):
    def loss(a):
        return (math.log(a) - center) ** 2

    grid, losses = widened((30.0, 10.0, 100.0), loss)
    assert grid == sorted(grid) and losses == [loss(a) for a in grid] and {10.0, 30.0, 100.0} <= set(grid)
    assert len(grid) == 3 or math.exp(center) < 20 or math.exp(center) > 50
    if math.exp(center) > 4:
        assert math.log(vertex(grid, losses)) == pytest.approx(center, abs=1e-6)


def test_a_loss_without_a_minimum_ends_the_grid():
    grid, _ = widened((10.0, 30.0, 100.0), lambda a: -a)
    assert grid[0] == 10.0 and WIDEST[1] / 2 < grid[-1] <= WIDEST[1]
    grid, _ = widened((10.0, 30.0, 100.0), lambda a: a)
    assert grid[-1] == 100.0 and WIDEST[0] <= grid[0] < 2 * WIDEST[0]
    assert widened((10.0, 30.0, 100.0), lambda a: 1.0)[0] == [10.0, 30.0, 100.0]


@given(
    st.lists(st.floats(1.1, 1e4), min_size=3, max_size=8, unique_by=lambda a: round(math.log(a), 2)),
    st.floats(0.2, 9.0),
    st.floats(0.01, 10.0),
)
def test_a_parabola_gives_its_own_vertex(grid, center, curvature):
    grid = sorted(grid)
    losses = [3.0 + curvature * (math.log(a) - center) ** 2 for a in grid]
    best = int(np.argmin(losses))
    found = vertex(grid, losses)
    if best in (0, len(grid) - 1):
        assert found == grid[best]
    else:
        assert math.log(found) == pytest.approx(center, abs=1e-4)


def test_a_value_given_twice_is_tried_once():
    grid, losses = widened((5000.0, 20.0, 5000.0, 100.0), lambda a: (np.log(a) - np.log(9000.0)) ** 2)
    assert grid == [20.0, 100.0, 5000.0, 10_000.0, 20_000.0]
    assert vertex(grid, losses) == pytest.approx(9000.0)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_fit(student, broken):
    model, params = student
    windows = np.random.default_rng(6).integers(0, 31, (3, 41), dtype=np.int32)
    bad = params | {"final_norm": np.full_like(params["final_norm"], broken)}
    with pytest.raises(HypenetError, match="the loss with a = 1.5 is nan .*no fit"):
        fit_scale(model, bad, windows, GRID, batch_size=2)


@pytest.mark.parametrize("place", [0, 1, 3, 4, 7])
def test_a_single_loss_that_is_not_finite_is_named(place):
    """In the grid or where it was followed to: the smallest of all comparisons with nan would be nan itself."""
    tried = []

    def loss(a):
        tried.append(a)
        return math.nan if len(tried) == place + 1 else -a

    with pytest.raises(HypenetError, match="is nan") as caught:
        widened((10.0, 30.0, 100.0, 200.0), loss)
    assert f"a = {tried[-1]:g} " in str(caught.value) and len(tried) == place + 1


def test_the_unscaled_loss_must_be_finite_too(monkeypatch, student):
    windows = np.random.default_rng(6).integers(0, 31, (2, 9), dtype=np.int32)
    monkeypatch.setattr("hypenet_jax.halo.fit_scale.UNSCALED", math.nan)
    with pytest.raises(HypenetError, match="without scaling"):
        fit_scale(*student, windows, GRID)
