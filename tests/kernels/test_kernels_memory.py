"""What the portable kernels never hold: full logits, full scores, a state a chunk."""

import math

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.attention import attention
from kernels_pallas.cross_entropy import linear_cross_entropy, linear_kl
from kernels_pallas.lightning import lightning_attention, slopes


def _shapes(jaxpr):
    """The shapes of all values of a jaxpr and of the jaxprs within it."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.shape
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from _shapes(getattr(inner, "jaxpr", inner))


def _is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def _traced(function, *arguments):
    return list(_shapes(jax.make_jaxpr(function)(*arguments).jaxpr))


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("kind", ["kl", "cross_entropy"])
@pytest.mark.parametrize("differentiated", [False, True])
def test_losses_hold_one_chunk_of_logits(backend, kind, differentiated):
    tokens, width, vocabulary, chunk = 640, 16, 97, 64
    hidden, weight = jnp.zeros((tokens, width)), jnp.zeros((width, vocabulary))
    mask, labels = jnp.ones(tokens, bool), jnp.zeros(tokens, jnp.int32)

    def loss(hidden, weight):
        if kind == "kl":
            return linear_kl(hidden, weight, hidden, weight, mask, token_chunk=chunk, backend=backend)[0]
        return linear_cross_entropy(hidden, weight, labels, mask, token_chunk=chunk, backend=backend)[0]

    shapes = _traced(jax.grad(loss, (0, 1)) if differentiated else loss, hidden, weight)
    with_vocabulary = max(math.prod(s) for s in shapes if vocabulary in s)
    # The reference, which does hold them all, shows that this test can fail.
    assert (with_vocabulary > max(chunk, width) * vocabulary) == (backend == "reference")


@pytest.mark.parametrize("segmented", [False, True])
def test_lightning_keeps_no_state_a_chunk(segmented):
    batch, length, heads, key, value = 2, 1024, 3, 40, 24
    q = k = jnp.zeros((batch, length, heads, key))
    v = jnp.zeros((batch, length, heads, value))
    ids = jnp.zeros((batch, length), jnp.int32) if segmented else None

    def function(q, k, v):
        return lightning_attention(q, k, v, slopes(heads), segment_ids=ids, backend="xla")

    (o, state), pull = jax.vjp(function, q, k, v)
    residuals = sum(x.size for x in jax.tree.leaves(pull) if hasattr(x, "size"))
    assert residuals <= q.size + k.size + v.size + state.size + heads + 2 * batch * length

    def both(q, k, v):
        outputs, pull = jax.vjp(function, q, k, v)
        return pull(outputs)

    states = [s for s in _traced(both, q, k, v) if s[-2:] == (key, value)]
    assert states and max(math.prod(s) for s in states) == batch * heads * key * value
    assert max(math.prod(s) for s in _traced(both, q, k, v)) <= batch * length * heads * max(key, 128)


@pytest.mark.parametrize("backend", ["xla", "reference"])
def test_attention_holds_blocks_of_scores(backend):
    batch, length, heads = 1, 2048, 2
    q = k = v = jnp.zeros((batch, length, heads, 8))

    def loss(q, k, v):
        return attention(q, k, v, backend=backend).sum()

    largest = max(math.prod(s) for s in _traced(jax.grad(loss, (0, 1, 2)), q, k, v))
    assert (largest >= length * length) == (backend == "reference")
