"""The contract of the fused losses, for every backend, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.cross_entropy import api, linear_cross_entropy, linear_kl, xla
from kernels_pallas.selfcheck import relative_error

BACKENDS = sorted(api.BACKENDS)
FLOAT32, BFLOAT16 = 1e-5, 6e-3
VOCABULARY = 37


def _inputs(tokens, seed=0, dtype=np.float32, width=16, teacher_width=24):
    rng = np.random.default_rng(seed)
    sizes = [(*tokens, width), (width, VOCABULARY), (*tokens, teacher_width), (teacher_width, VOCABULARY)]
    values = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    values[1], values[3] = values[1] / 4, values[3] / 4
    labels, mask = rng.integers(0, VOCABULARY, tokens).astype(np.int32), rng.random(tokens) < 0.7
    return [x.astype(dtype) for x in values], labels, mask


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _kl(backend, token_chunk, temperature, values, mask):
    def loss(student, weight, teacher):
        options = {"token_chunk": token_chunk, "temperature": temperature, "backend": backend}
        return linear_kl(student, weight, *teacher, mask, **options)

    outputs, pull = jax.vjp(loss, *values[:2], tuple(values[2:]))
    dstudent, dweight, dteacher = pull((jnp.asarray(3.0, outputs[0].dtype), jnp.ones_like(outputs[1])))
    return (*outputs, dstudent, dweight), dteacher


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cross_entropy(backend, token_chunk, values, labels, mask):
    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, mask, token_chunk=token_chunk, backend=backend)

    outputs, pull = jax.vjp(loss, *values[:2])
    return (*outputs, *pull((jnp.asarray(3.0, outputs[0].dtype), jnp.ones_like(outputs[1]))))


def _wide(function, values, *rest):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function([np.asarray(x, np.float64) for x in values], *rest))


def _assert_close(results, expected, tolerance):
    for name, value, right in zip(("mean", "count", "d hidden", "d weight"), results, expected, strict=True):
        error = relative_error(value, right)
        assert error <= tolerance, f"{name}: {error:.2e}"


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_numpy(backend):
    values, labels, mask = _inputs((41,))
    hidden, weight, far, far_weight = (x.astype(np.float64) for x in values)
    student, teacher = _log_softmax(hidden @ weight / 2), _log_softmax(far @ far_weight / 2)
    kl = (np.exp(teacher) * (teacher - student)).sum(-1)
    mean, count = linear_kl(*values, mask, temperature=2.0, token_chunk=8, backend=backend)
    np.testing.assert_allclose([mean, count], [kl[mask].mean(), mask.sum()], rtol=1e-5)
    nll = -_log_softmax(hidden @ weight)[np.arange(41), labels]
    mean, count = linear_cross_entropy(*values[:2], labels, mask, token_chunk=8, backend=backend)
    np.testing.assert_allclose([mean, count], [nll[mask].mean(), mask.sum()], rtol=1e-5)
    assert mean.dtype == count.dtype == jnp.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [(1,), (53,), (3, 17), (1, 64)])
@pytest.mark.parametrize("token_chunk", [None, 1, 16])
def test_values_and_gradients(backend, tokens, token_chunk):
    values, labels, mask = _inputs(tokens)
    mask.flat[0] = True
    results, dteacher = _kl(backend, token_chunk, 1.7, values, mask)
    expected, _ = _wide(functools.partial(_kl, "reference", None, 1.7), values, mask)
    _assert_close(results, expected, FLOAT32)
    assert not any(np.any(x) for x in dteacher)
    results = _cross_entropy(backend, token_chunk, values, labels, mask)
    expected = _wide(functools.partial(_cross_entropy, "reference", None), values, labels, mask)
    _assert_close(results, expected, FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_hidden_with_float32_weight(backend):
    values, labels, mask = _inputs((3, 50), dtype=jnp.bfloat16, width=64, teacher_width=64)
    values[1] = values[1].astype(np.float32)
    results, _ = _kl(backend, 32, 1.0, values, mask)
    assert results[2].dtype == jnp.bfloat16 and results[3].dtype == jnp.float32
    _assert_close(results, _wide(functools.partial(_kl, "reference", None, 1.0), values, mask)[0], BFLOAT16)
    results = _cross_entropy(backend, 32, values, labels, mask)
    expected = _wide(functools.partial(_cross_entropy, "reference", None), values, labels, mask)
    _assert_close(results, expected, BFLOAT16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_mask_gives_zero(backend):
    values, labels, mask = _inputs((2, 9))
    for x in (
        *_kl(backend, None, 1.0, values, mask & False)[0],
        *_cross_entropy(backend, 4, values, labels, mask & False),
    ):
        np.testing.assert_array_equal(x, np.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_labels_may_be_anything(backend):
    values, labels, mask = _inputs((30,))
    strange = np.where(mask, labels, -100).astype(np.int32)
    for right, got in zip(
        _cross_entropy(backend, 8, values, labels, mask), _cross_entropy(backend, 8, values, strange, mask), strict=True
    ):
        np.testing.assert_array_equal(got, right)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_like_its_teacher_has_no_loss(backend):
    values, _, mask = _inputs((20,))
    (mean, _, dhidden, _), _ = _kl(backend, 8, 1.0, [*values[:2], *values[:2]], mask)
    assert abs(float(mean)) < 1e-6 and np.abs(dhidden).max() < 1e-6


def test_large_logits_stay_finite():
    values, labels, mask = _inputs((20,))
    values[0], values[2] = values[0] * 1e3, values[2] * 1e3
    results = (*_kl("xla", 8, 1.0, values, mask)[0], *_cross_entropy("xla", 8, values, labels, mask))
    assert all(np.isfinite(x).all() for x in results)


@pytest.mark.parametrize("vocabulary", [257, 4096, 151936])
@pytest.mark.parametrize("shape", [(8, 512), (1, 16384), (96, 512), (1, 7), (5000, 3)])
def test_the_chunk_covers_the_tokens(vocabulary, shape):
    batch, length = shape
    chunk = xla._chunk(None, batch, length, vocabulary)
    assert 1 <= chunk <= length and (chunk == 1 or batch * chunk <= 2048)


def test_mistakes_are_named():
    (hidden, weight, far, far_weight), labels, mask = _inputs((2, 9))
    with pytest.raises(ValueError, match="the teacher's weight has shape"):
        linear_kl(hidden, weight, far, weight, mask)
    with pytest.raises(ValueError, match="vocabulary has 37 entries and the teacher's 30"):
        linear_kl(hidden, weight, far, far_weight[:, :30], mask)
    with pytest.raises(ValueError, match="temperature is 0"):
        linear_kl(hidden, weight, far, far_weight, mask, temperature=0)
    with pytest.raises(ValueError, match="the mask has shape"):
        linear_cross_entropy(hidden, weight, labels, mask[:1])
    with pytest.raises(ValueError, match="labels have shape"):
        linear_cross_entropy(hidden, weight, labels[:1], mask)
    with pytest.raises(ValueError, match="token_chunk is 0"):
        linear_cross_entropy(hidden, weight, labels, mask, token_chunk=0)
    with pytest.raises(ValueError, match="known: auto, xla, reference"):
        linear_cross_entropy(hidden, weight, labels, mask, backend="liger")
