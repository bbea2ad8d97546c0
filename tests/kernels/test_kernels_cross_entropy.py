"""The contract of the fused losses, for every backend, against float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.cross_entropy import api, gpu, linear_cross_entropy, linear_kl, linear_kl_from_top_k, sweep
from kernels_pallas.dispatch import Backend, Refused
from kernels_pallas.selfcheck import relative_error

BACKENDS = sorted(api.BACKENDS)
FLOAT32, BFLOAT16 = 1e-5, 4e-3
VOCABULARY = 37


@pytest.fixture(autouse=True)
def interpreted_gpu(request, monkeypatch):
    if request.node.get_closest_marker("gpu") is None:
        interpreted = Backend("gpu", functools.partial(gpu.linear_loss, interpret=True), gpu.unsupported)
        monkeypatch.setitem(api.BACKENDS, "gpu", interpreted)


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


@pytest.mark.parametrize("backend", ["gpu", "xla"])
def test_large_logits_stay_finite(backend):
    values, labels, mask = _inputs((20,))
    values[0], values[2] = values[0] * 1e3, values[2] * 1e3
    results = (*_kl(backend, 8, 1.0, values, mask)[0], *_cross_entropy(backend, 8, values, labels, mask))
    assert all(np.isfinite(x).all() for x in results)


@pytest.mark.parametrize("vocabulary", [257, 4096, 151936])
@pytest.mark.parametrize("shape", [(8, 512), (1, 16384), (96, 512), (1, 7), (1, 513), (1, 1536), (5000, 3)])
def test_the_chunks_cover_the_tokens(vocabulary, shape):
    batch, length = shape
    chunk, step = sweep.chunking(None, batch, length, vocabulary)
    assert 1 <= chunk <= step <= length and (chunk == 1 or batch * chunk <= 2048)
    # Few tokens have their turn twice.
    assert -(-length // step) * step <= 1.1 * length + 10
    assert step == chunk or vocabulary > 2**14
    if vocabulary > 2**14 and batch * length > 512 and length > 16:
        assert step < length  # the gradients of all logits are never there at once


@functools.cache
def _option_inputs(tokens, vocabulary, seed, scale):
    rng = np.random.default_rng(seed)
    sizes = [(*tokens, 16), (16, vocabulary), (*tokens, 24), (24, vocabulary)]
    values = [scale * rng.standard_normal(size).astype(np.float32) for size in sizes]
    labels = rng.integers(0, vocabulary, tokens).astype(np.int32)
    return values, labels, rng.random(tokens) < 0.7, rng.random(tokens) < 0.5


@hypothesis.given(
    tokens=st.sampled_from([(1,), (2, 13)]),
    vocabulary=st.sampled_from([1, 2, 130]),
    token_chunk=st.sampled_from([None, 1, 8]),
    temperature=st.sampled_from([1.0, 0.7, 3.0]),
    kept=st.sampled_from([None, "one", "some", "all"]),
    tail=st.sampled_from(["bucket", "renormalise"]),
    ce_weight=st.sampled_from([0.0, 0.25, 1.0]),
    own_ce_mask=st.booleans(),
    masks=st.sampled_from(["random", "all", "none"]),
    seed=st.integers(0, 3),
)
def test_every_option_against_float64(
    tokens, vocabulary, token_chunk, temperature, kept, tail, ce_weight, own_ce_mask, masks, seed
):
    values, labels, mask, ce_mask = _option_inputs(tokens, vocabulary, seed, 0.5)
    mask, ce_mask = {"random": (mask, ce_mask), "all": (mask | True, ce_mask | True)}.get(masks, (mask & False,) * 2)
    top_k = {None: None, "one": 1, "some": (vocabulary + 2) // 3, "all": vocabulary}[kept]
    options = {"temperature": temperature, "top_k": top_k, "tail": tail, "ce_weight": ce_weight}
    options |= {"labels": labels, "ce_mask": ce_mask if own_ce_mask else None}

    def run(backend, values):
        loss = lambda p: linear_kl(*p, *values[2:], mask, token_chunk=token_chunk, backend=backend, **options)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(tuple(values[:2]))

    (right, right_count), right_gradients = _wide(functools.partial(run, "reference"), values)
    whole = top_k is None and (temperature == 1.0 or ce_weight == 0)
    for backend in ("xla", "gpu") if whole else ("xla",):
        (mean, count), gradients = run(backend, values)
        assert count == right_count
        # A sum of terms of either sign loses the digits of its largest: the error is relative to terms of order 1.
        assert abs(mean - right) <= FLOAT32 * max(abs(right), 0.1)
        for got, wanted in zip(gradients, right_gradients, strict=True):
            assert relative_error(got, wanted, 1e-3) <= FLOAT32


def test_the_buckets_by_hand():
    """Three entries, the likeliest kept: two outcomes, in closed form; and a cached teacher says the same."""
    hidden, weight = np.ones((1, 1), np.float32), np.log([[0.2, 0.3, 0.5]]).astype(np.float32)
    far_weight = np.log([[0.7, 0.2, 0.1]]).astype(np.float32)
    mask = np.ones(1, bool)
    bucket = 0.7 * np.log(0.7 / 0.2) + 0.3 * np.log(0.3 / 0.8)
    np.testing.assert_allclose(linear_kl(hidden, weight, hidden, far_weight, mask, top_k=1)[0], bucket, rtol=1e-6)
    kept = linear_kl(hidden, weight, hidden, far_weight, mask, top_k=1, tail="renormalise")[0]
    np.testing.assert_allclose(kept, np.log(1 / 0.2), rtol=1e-6)
    cached = np.array([[0]]), np.log([[0.7]]), np.array([0.3])
    np.testing.assert_allclose(linear_kl_from_top_k(hidden, weight, *cached, mask)[0], bucket, rtol=1e-6)


def test_a_cached_teacher_equals_the_one_that_it_was_taken_from():
    values, labels, mask, ce_mask = _option_inputs((2, 13), 130, 0, 0.5)
    log_p = jax.nn.log_softmax(values[2] @ values[3] / 2)
    log_probs, indices = jax.lax.top_k(log_p, 9)
    tail = 1 - jnp.exp(log_probs).sum(-1)
    mix = {"temperature": 2.0, "labels": labels, "ce_weight": 0.4, "ce_mask": ce_mask, "token_chunk": 8}
    whole = jax.grad(lambda p: linear_kl(*p, *values[2:], mask, top_k=9, **mix)[0])(tuple(values[:2]))
    cached = lambda p: linear_kl_from_top_k(*p, indices, log_probs, tail, mask, **mix)[0]  # noqa: E731
    for got, right in zip(jax.grad(cached)(tuple(values[:2])), whole, strict=True):
        assert relative_error(got, right) < FLOAT32


@pytest.mark.parametrize("backend", ["gpu", "xla"])
def test_masked_tokens_may_hold_anything(backend):
    values, labels, mask, ce_mask = _option_inputs((29,), 37, 1, 0.5)
    poisoned = [
        np.where((mask | ce_mask)[:, None], values[0], np.nan),
        values[1],
        np.where(mask[:, None], values[2], np.nan),
    ]
    mix = {"labels": labels, "ce_weight": 0.4, "ce_mask": ce_mask, "token_chunk": 8, "backend": backend}
    run = jax.value_and_grad(lambda p, far: linear_kl(*p, far, values[3], mask, **mix)[0])
    for got, right in zip(
        jax.tree.leaves(run(tuple(poisoned[:2]), poisoned[2])),
        jax.tree.leaves(run(tuple(values[:2]), values[2])),
        strict=True,
    ):
        np.testing.assert_array_equal(got, right)


@pytest.mark.parametrize("backend", ["gpu", "xla"])
@pytest.mark.parametrize("length", [16, 50, 53])
def test_chunks_that_share_a_weight_product(backend, length, monkeypatch):
    """With a large vocabulary; a last chunk and a last product reach back over tokens that had their turn."""
    monkeypatch.setattr(sweep, "LARGE_VOCABULARY", 20)
    jax.clear_caches()
    values, labels, mask = _inputs((length,))
    results, _ = _kl(backend, 5, 1.0, values, mask)
    _assert_close(results, _wide(functools.partial(_kl, "reference", None, 1.0), values, mask)[0], FLOAT32)
    half = [x.astype(jnp.bfloat16) for x in values]
    results, _ = _kl(backend, 5, 1.0, half, mask)
    assert results[3].dtype == jnp.bfloat16
    _assert_close(results, _wide(functools.partial(_kl, "reference", None, 1.0), half, mask)[0], BFLOAT16)
    jax.clear_caches()


@pytest.mark.parametrize("blocks", [2, 5])
def test_blocks_of_a_row_merge(blocks):
    """What the GPU kernel's programs publish, merged as each of them does."""
    s, t = 5 * np.random.default_rng(0).standard_normal((2, blocks, 40)).astype(np.float32)
    s[0] += 30
    tops = s.max(1), t.max(1)
    exp_s, exp_t = np.exp(s - tops[0][:, None]), np.exp(t - tops[1][:, None])
    cross = (exp_t * ((t - tops[1][:, None]) - (s - tops[0][:, None]))).sum(1)
    nothing = (-np.inf, 0.0, -np.inf, 0.0, 0.0)
    statistics = [
        np.append(x, y) for x, y in zip((tops[0], exp_s.sum(1), tops[1], exp_t.sum(1), cross), nothing, strict=True)
    ]
    top, total, _, _, kl = gpu.merge(*map(jnp.asarray, statistics))
    log_s, log_t = _log_softmax(s.astype(np.float64).ravel()), _log_softmax(t.astype(np.float64).ravel())
    np.testing.assert_allclose(top + np.log(total), s.ravel()[0] - log_s[0], rtol=1e-6)
    np.testing.assert_allclose(kl, (np.exp(log_t) * (log_t - log_s)).sum(), rtol=1e-5)


def test_the_gpu_kernel_says_what_it_does_not_do():
    (hidden, weight, far, far_weight), labels, mask = _inputs((2, 9))
    call = functools.partial(linear_kl, hidden, weight, far, far_weight, mask, backend="gpu")
    with pytest.raises(Refused, match="whole distribution"):
        call(top_k=3)
    with pytest.raises(Refused, match="cross entropy is at temperature 1 and the divergence at 2.0"):
        call(temperature=2.0, ce_weight=0.5, labels=labels)
    mesh = jax.make_mesh((2,), ("v",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), pytest.raises(Refused, match="call it within shard_map"):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [130, 20011, 151936])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_on_a_gpu(vocabulary, dtype):
    """Rows of many blocks: the kernel as it runs, several times, for what the interpreter cannot show."""
    values, labels, mask, ce_mask = _option_inputs((2, 301), vocabulary, 0, 0.5)
    values = [jnp.asarray(x, dtype) for x in values]

    def loss(p, backend):
        mix = {"labels": labels, "ce_weight": 0.4, "ce_mask": ce_mask, "token_chunk": 64}
        return linear_kl(*p, *values[2:], mask, backend=backend, **mix)[0]

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = jax.tree.leaves(run(tuple(values[:2]), "reference"))
    for _ in range(5):
        for got, right in zip(jax.tree.leaves(run(tuple(values[:2]), "gpu")), expected, strict=True):
            assert relative_error(got, right) <= (FLOAT32 if dtype == np.float32 else BFLOAT16)


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
    with pytest.raises(ValueError, match="top_k is 38 but must lie between 1 and the 37"):
        linear_kl(hidden, weight, far, far_weight, mask, top_k=38)
    with pytest.raises(ValueError, match="tail is 'drop' but must be one of bucket, renormalise"):
        linear_kl(hidden, weight, far, far_weight, mask, top_k=3, tail="drop")
    with pytest.raises(ValueError, match=r"ce_weight is 1.5 but must lie between 0 and 1"):
        linear_kl(hidden, weight, far, far_weight, mask, labels=labels, ce_weight=1.5)
    with pytest.raises(ValueError, match="there are no labels"):
        linear_kl(hidden, weight, far, far_weight, mask, ce_weight=0.5)
    with pytest.raises(ValueError, match="ce_mask has shape"):
        linear_kl(hidden, weight, far, far_weight, mask, labels=labels, ce_weight=0.5, ce_mask=mask[:1])
    with pytest.raises(ValueError, match="both must be the mask's"):
        linear_kl_from_top_k(hidden, weight, labels, labels, mask, mask)
    with pytest.raises(ValueError, match="the tail's mass has shape"):
        linear_kl_from_top_k(hidden, weight, labels[..., None], labels[..., None], mask[:1], mask)
    with pytest.raises(ValueError, match="known: auto, "):
        linear_cross_entropy(hidden, weight, labels, mask, backend="liger")
