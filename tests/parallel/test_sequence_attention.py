"""Attention by ring and by gather over a sequence in zigzag order is that of one device, and so are its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_cases import BATCH, LENGTH, SHARDS, P, over_seq, segments, to_natural, to_zigzag

from hypenet_jax.parallel.sequence import attention as sequence
from kernels_pallas.attention import reference
from kernels_pallas.selfcheck import relative_error

HEADS, KV_HEADS, WIDTH, SCALE = 4, 2, 4, 0.3
SPECS = {"ids": P(None, "seq"), "factor": P("seq"), **{name: P(None, "seq") for name in "qkv"}}


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [rng.standard_normal((BATCH, LENGTH, n, WIDTH)).astype(np.float32) for n in heads]


def on_one_device(q, k, v, ids, factor):
    return reference.attention(q, k, v, causal=True, segment_ids=ids, scale=SCALE, logit_scale=factor)


def on_shards(shards, exchange, q, k, v, ids, factor):
    def run(axis, q, k, v, ids=None, factor=None):
        row = None if factor is None else factor[None]
        q, k, v, ids, row = to_zigzag(axis, (q, k, v, ids, row))
        options = {"segment_ids": ids, "logit_scale_T": None if row is None else row[0], "scale": SCALE}
        o = sequence.attention(q, k, v, axis_name=axis, exchange=exchange, **options)
        return to_natural(axis, [o])[0]

    operands = {"q": q, "k": k, "v": v, "ids": ids, "factor": factor}
    return over_seq(run, shards, operands, SPECS, P(None, "seq"))


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, q, k, v, do, ids, factor):
    o, pull = jax.vjp(lambda q, k, v: function(q, k, v, ids, factor), q, k, v)
    return (o, *pull(do))


@functools.cache
def sharded(shards, exchange):
    return functools.partial(on_shards, shards, exchange)


def check(shards, exchange, ids, factor=None):
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in arrays()]
        right = [np.asarray(x) for x in with_gradients(on_one_device, *wide, ids, factor)]
    got = with_gradients(sharded(shards, exchange), *arrays(), ids, factor)
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, right, strict=True):
        # A document of one token has dq = dk = 0, each a difference of terms of order 1.
        assert relative_error(a, b, 1.0) <= 1e-5, name
    if ids is not None:
        assert not np.asarray(got[0])[ids < 0].any()


@pytest.mark.parametrize("exchange", ["ring", "gather"])
@pytest.mark.parametrize("shards", SHARDS)
def test_one_document_with_growing_scales(shards, exchange):
    check(shards, exchange, None, np.linspace(1, 2, LENGTH).astype(np.float32))


@pytest.mark.parametrize("exchange", ["ring", "gather"])
@settings(max_examples=20)
@given(ids=segments(), shards=st.sampled_from(SHARDS))
def test_documents_and_padding(exchange, ids, shards):
    check(shards, exchange, ids)


def test_auto_gathers_what_is_small_and_rings_the_rest():
    part = jax.ShapeDtypeStruct((1, 2**13, 8, 128), jnp.bfloat16)  # of keys: 16 MiB a shard
    assert sequence.chosen(part, part, 8) == "gather"
    assert sequence.chosen(part, part, 16) == "ring"


def test_what_a_shard_may_see_of_anothers_keys():
    places = [0, 1, 6, 7]  # of shard 0 of 2, half-blocks of 2
    assert sequence._last_seen(jnp.array(places), 0, 2).tolist() == [0, 1, 2, 3]
    assert sequence._last_seen(jnp.array(places), 1, 2).tolist() == [-1, -1, 3, 3]
    assert sequence._last_seen(jnp.array([2, 3, 4, 5]), 0, 2).tolist() == [1, 1, 1, 1]


def test_unknown_exchanges_are_named():
    with pytest.raises(ValueError, match="'tree'.*ring"):
        check(2, "tree", None)
