import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_training import init_params, make_stage

from hypenet_jax.train.optim import decays, learning_rate, make_optimizer


def test_cosine_at_given_steps():
    rate = learning_rate(make_stage(steps=250, warmup_steps=50, peak_lr=1e-3, end_lr=1e-5))
    middle = (1e-3 + 1e-5) / 2
    for step, wanted in [(1, 2e-5), (25, 5e-4), (50, 1e-3), (150, middle), (250, 1e-5)]:
        assert rate(step) == pytest.approx(wanted, rel=1e-5), step
    quarter = 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + np.cos(np.pi * 0.25))
    assert rate(100) == pytest.approx(quarter, rel=1e-5)


def test_the_other_schedules():
    stable = learning_rate(make_stage(schedule="warmup_stable", warmup_steps=4, peak_lr=1e-2))
    assert [float(stable(n)) for n in (1, 4, 12)] == pytest.approx([2.5e-3, 1e-2, 1e-2])
    constant = learning_rate(make_stage(schedule="constant", peak_lr=1e-2))
    assert [float(constant(n)) for n in (1, 12)] == pytest.approx([1e-2, 1e-2])
    bare = learning_rate(make_stage(warmup_steps=0, steps=10, peak_lr=1e-2, end_lr=1e-3))
    assert [float(bare(n)) for n in (0, 10)] == pytest.approx([1e-2, 1e-3])


def test_the_first_update_uses_the_rate_of_step_1():
    stage = make_stage(clip_norm=1e9)
    optimizer, params = make_optimizer(stage), {"w": jnp.zeros(3)}
    updates, _ = optimizer.update({"w": jnp.array([1.0, -2.0, 3.0])}, optimizer.init(params), params)
    # Adam's first step is the sign of the gradient times the learning rate.
    rate = float(learning_rate(stage)(1))
    np.testing.assert_allclose(updates["w"], [-rate, rate, -rate], rtol=1e-5)


def test_norms_do_not_decay():
    marks = decays(init_params() | {"layer_0": {"mixer": {"q_norm": jnp.ones(2), "q": jnp.ones(2)}}})
    assert marks["embedding"] and marks["mlp"]["up"] and marks["layer_0"]["mixer"]["q"]
    assert not marks["final_norm"] and not marks["layer_0"]["mixer"]["q_norm"]
    params = init_params()
    optimizer = make_optimizer(make_stage(weight_decay=0.1))
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert not np.array_equal(moved["mlp"]["up"], params["mlp"]["up"])
    np.testing.assert_array_equal(moved["final_norm"], params["final_norm"])


def test_gradients_are_clipped_by_their_global_norm():
    optimizer, params = make_optimizer(make_stage(clip_norm=1.0)), {"w": jnp.zeros(2)}
    _, state = optimizer.update({"w": jnp.array([30.0, 40.0])}, optimizer.init(params), params)
    np.testing.assert_allclose(state[1].mu["w"], 0.1 * np.array([0.6, 0.8]), rtol=1e-5)
