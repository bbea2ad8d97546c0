import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypenet_jax.train.losses import distill_loss, lm_loss


@pytest.fixture
def arrays():
    keys = jax.random.split(jax.random.key(3), 4)
    student_BTD, teacher_BTE = jax.random.normal(keys[0], (2, 5, 4)), jax.random.normal(keys[1], (2, 5, 6))
    return student_BTD, jax.random.normal(keys[2], (4, 11)), teacher_BTE, jax.random.normal(keys[3], (6, 11))


def test_distillation_is_the_mean_kl_over_tokens_that_are_not_padding(arrays):
    student_BTD, student_DV, teacher_BTE, teacher_EV = arrays
    batch = {"segment_ids": jnp.array([[0, 0, 1, 1, -1], [0, 0, 0, -1, -1]])}
    loss, metrics = distill_loss(student_BTD, student_DV, teacher_BTE, teacher_EV, batch, token_chunk=2)
    log_q, log_p = jax.nn.log_softmax(student_BTD @ student_DV), jax.nn.log_softmax(teacher_BTE @ teacher_EV)
    kl_BT = np.asarray(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))
    assert float(loss) == pytest.approx(kl_BT[np.asarray(batch["segment_ids"]) >= 0].mean(), rel=1e-5)
    assert metrics == {"count": 7.0}


def test_the_teacher_gets_no_gradient(arrays):
    student_BTD, student_DV, teacher_BTE, teacher_EV = arrays
    batch = {"segment_ids": jnp.zeros((2, 5), jnp.int32)}

    def loss(student, teacher):
        return distill_loss(student, student_DV, teacher, teacher_EV, batch)[0]

    of_student, of_teacher = jax.grad(loss, argnums=(0, 1))(student_BTD, teacher_BTE)
    assert float(jnp.abs(of_student).max()) > 0 and float(jnp.abs(of_teacher).max()) == 0


def test_language_modelling_is_the_mean_nll_under_the_loss_mask(arrays):
    hidden_BTD, head_DV, _, _ = arrays
    batch = {
        "targets": jnp.array([[1, 2, 3, 4, 5], [10, 9, 8, 7, 6]]),
        "loss_mask": jnp.array([[True, True, False, True, True], [True, False, False, False, False]]),
    }
    loss, metrics = lm_loss(hidden_BTD, head_DV, batch, token_chunk=4)
    log_p = jax.nn.log_softmax(hidden_BTD @ head_DV)
    nll_BT = -np.take_along_axis(np.asarray(log_p), np.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    assert float(loss) == pytest.approx(nll_BT[np.asarray(batch["loss_mask"])].mean(), rel=1e-5)
    assert metrics == {"count": 5.0}
