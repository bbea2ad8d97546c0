"""The losses with the vocabulary over a mesh axis equal the losses without a mesh; nothing gathers the weight."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.cross_entropy import linear_cross_entropy, linear_kl, linear_kl_from_top_k
from kernels_pallas.selfcheck import relative_error

BATCH, LENGTH, WIDTH, TEACHER_WIDTH, VOCABULARY, K = 4, 11, 16, 24, 40, 7
OPTIONS = {
    "plain": {},
    "warm": {"temperature": 1.7},
    "bucket": {"top_k": K},
    "renormalised": {"top_k": K, "tail": "renormalise", "temperature": 0.8},
    "wide": {"top_k": 30},
    "mixed": {"ce_weight": 0.3, "temperature": 2.0},
    "mixed bucket": {"ce_weight": 0.3, "top_k": K},
}


def _mesh(**sizes):
    axes = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axes)


def _inputs():
    rng = np.random.default_rng(0)
    tokens = (BATCH, LENGTH)
    sizes = [(*tokens, WIDTH), (WIDTH, VOCABULARY), (*tokens, TEACHER_WIDTH), (TEACHER_WIDTH, VOCABULARY)]
    hidden, weight, far, far_weight = (rng.standard_normal(size).astype(np.float32) for size in sizes)
    labels = rng.integers(0, VOCABULARY, tokens).astype(np.int32)
    mask, ce_mask = rng.random(tokens) < 0.7, rng.random(tokens) < 0.6
    return (hidden, weight / 4), (far, far_weight / 4, labels, mask, ce_mask)


def _loss(options, axis, parameters, rest):
    """The loss times its count, and the count: what adds up over shards of the tokens."""
    (hidden, weight), (far, far_weight, labels, mask, ce_mask) = parameters, rest
    common = {"vocab_axis": axis, "token_chunk": 12}
    if options == "cross entropy":
        loss, count = linear_cross_entropy(hidden, weight, labels, mask, **common)
    elif options == "cached":
        far = jax.nn.log_softmax(far[..., :K])
        indices = (labels[..., None] + 5 * jnp.arange(K)) % VOCABULARY
        tail = jnp.where(labels % 2, 0.25, 0.0)
        log_probs = far + jnp.log1p(-tail)[..., None]
        loss, count = linear_kl_from_top_k(hidden, weight, indices, log_probs, tail, mask, **common)
    else:
        mix = {"labels": labels, "ce_mask": ce_mask} if "ce_weight" in OPTIONS[options] else {}
        loss, count = linear_kl(hidden, weight, far, far_weight, mask, **mix, **OPTIONS[options], **common)
    return loss, count


@functools.cache
def _expected(options):
    parameters, rest = _inputs()
    run = jax.value_and_grad(lambda parameters: _loss(options, None, parameters, rest)[0])
    return jax.tree.map(np.asarray, jax.jit(run)(parameters))


VARIANTS = [*OPTIONS, "cross entropy", "cached"]
SPECS = ((P(), P(None, "v")), (P(), P(None, "v"), P(), P(), P()))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("inside", [True, False])
def test_sharded_vocabulary(options, inside, check_vma):
    """`inside`: differentiated within shard_map."""
    parameters, rest = _inputs()

    @functools.partial(jax.shard_map, mesh=_mesh(v=4), in_specs=SPECS, out_specs=P(), check_vma=check_vma)
    def loss(parameters, rest):
        return _loss(options, "v", parameters, rest)[0]

    out_specs = (P(), SPECS[0])

    @functools.partial(jax.shard_map, mesh=_mesh(v=4), in_specs=SPECS, out_specs=out_specs, check_vma=check_vma)
    def both(parameters, rest):
        value, (dhidden, dweight) = jax.value_and_grad(lambda p: _loss(options, "v", p, rest)[0])(parameters)
        if not check_vma:
            # Without the types every shard has a loss of its own; a gradient is of their sum, in this shard's inputs.
            dhidden, dweight = jax.lax.psum(dhidden, "v") / 4, dweight / 4
        return value, (dhidden, dweight)

    results = jax.jit(both)(parameters, rest) if inside else jax.jit(jax.value_and_grad(loss))(parameters, rest)
    for value, right in zip(jax.tree.leaves(results), jax.tree.leaves(_expected(options)), strict=True):
        assert relative_error(value, right) < 3e-6


@pytest.mark.parametrize("shards", [2, 8])
@pytest.mark.parametrize("options", ["mixed bucket", "plain"])
def test_with_a_batch_axis(options, shards):
    """The mean over all tokens out of every token shard's mean and count (as a mean, where one mask serves)."""
    parameters, rest = _inputs()
    mesh = _mesh(b=8 // shards, v=shards)
    tokens = P(None, "b") if BATCH % (8 // shards) else P("b")
    specs = ((tokens, P(None, "v")), (tokens, P(None, "v"), tokens, tokens, tokens))
    rest = (*rest[:4], rest[3])

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P())
    def loss(parameters, rest):
        mean, count = _loss(options, "v", parameters, rest)
        return jax.lax.psum(mean * count, "b") / jax.lax.psum(count, "b")

    results = jax.jit(jax.value_and_grad(loss))(parameters, rest)
    expected = jax.value_and_grad(lambda parameters: _loss(options, None, parameters, rest)[0])(parameters)
    for value, right in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert relative_error(value, right) < 3e-6


@pytest.mark.parametrize("options", ["plain", "cross entropy"])
def test_automatic_sharding_gathers_no_weight(options):
    """Under plain jit the partitioner finds the same plan: the weight, its gradient and the logits stay sharded."""
    parameters, rest = _inputs()
    mesh = _mesh(b=2, v=4)
    place = lambda tree, specs: jax.device_put(tree, [NamedSharding(mesh, s) for s in specs])  # noqa: E731
    parameters = place(list(parameters), [P("b"), P(None, "v")])
    rest = place(list(rest), [P("b"), P(None, "v"), P("b"), P("b"), P("b")])
    step = (
        jax.jit(jax.value_and_grad(lambda p, rest: _loss(options, None, p, rest)[0])).lower(parameters, rest).compile()
    )
    value, (dhidden, dweight) = step(parameters, rest)
    for got, right in zip((value, dhidden, dweight), jax.tree.leaves(_expected(options)), strict=True):
        assert relative_error(got, right) < 3e-6
    assert dweight.sharding.spec == P(None, "v")
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", step.as_text())
    assert not gathered


def test_a_vocabulary_axis_needs_its_shard_map():
    (hidden, weight), (far, far_weight, _, mask, _) = _inputs()
    with pytest.raises(ValueError, match=r"vocab_axis is 'v' but must be an axis of an enclosing shard_map \(no axis"):
        linear_kl(hidden, weight, far, far_weight, mask, vocab_axis="v")
