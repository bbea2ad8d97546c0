"""All choices of layers in one program: each trains exactly as the student that was built for it."""

import jax
import numpy as np
import pytest

import hypenet_jax as hn
from hypenet_jax.halo.distill import distillation_loss
from hypenet_jax.halo.either import EitherModel, either_loss, either_tree


@pytest.fixture(scope="module")
def both(tiny):
    teacher, params = tiny
    _, attention = hn.convert(teacher, params, (0, 1), seed=4)
    rnn, lightning = hn.convert(teacher, params, (), seed=4)
    return EitherModel(rnn), either_tree(attention, lightning, 2)


def test_loss_and_gradients_are_those_of_the_student_in_one_program(tiny, both, packed_batch):
    teacher, params = tiny
    model, weights = both
    loss = jax.jit(jax.value_and_grad(lambda p, f: either_loss(teacher, model, 8)(p, f, packed_batch)[0]))
    for layers in ((), (0,), (1,)):
        student, own = hn.convert(teacher, params, layers, seed=4)
        alone = jax.jit(
            jax.value_and_grad(lambda p, s=student: distillation_loss(teacher, s, 8)(p, params, packed_batch)[0])
        )
        wanted, wanted_gradients = alone(own)
        got, gradients = loss(weights, {"teacher": params, "attention_L": np.isin(np.arange(2), layers)})
        assert float(got) == pytest.approx(float(wanted), rel=1e-5)
        for layer in range(2):
            name, other = ("attention", "lightning") if layer in layers else ("lightning", "attention")
            mixers = gradients[f"layer_{layer}"].pop("mixer")
            assert all(not np.any(leaf) for leaf in jax.tree.leaves(mixers[other]))
            gradients[f"layer_{layer}"]["mixer"] = mixers[name]
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))
    assert loss._cache_size() == 1
