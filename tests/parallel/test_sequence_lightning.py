"""Lightning over a sequence in zigzag order is that of one device: outputs, final state, and all gradients."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sequence_cases import BATCH, LENGTH, SHARDS, P, over_seq, segments, to_natural, to_zigzag

from hypenet_jax.parallel.sequence import lightning as sequence
from kernels_pallas import lightning
from kernels_pallas.lightning import reference
from kernels_pallas.selfcheck import relative_error

HEADS, KEYS, VALUES = 2, 3, 5  # 15 numbers a state: no number of shards divides them
SLOPES = np.array([0.05, 0.4], np.float32)
NAMES = ("o", "state", "dq", "dk", "dv", "dinitial")
SPECS = {"ids": P(None, "seq"), "state": P(), **{name: P(None, "seq") for name in "qkv"}}


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    sizes = [(BATCH, LENGTH, HEADS, n) for n in (KEYS, KEYS, VALUES)] + [(BATCH, HEADS, KEYS, VALUES)]
    return [rng.standard_normal(size).astype(np.float32) for size in (*sizes, sizes[2], sizes[3])]


def on_one_device(q, k, v, state, ids):
    options = {"slopes_H": SLOPES, "scale": 0.5, "initial_state": state, "segment_ids": ids}
    return reference.BACKEND.function(q, k, v, **options)


def on_shards(shards, q, k, v, state, ids):
    def run(axis, q, k, v, state=None, ids=None):
        q, k, v, ids = to_zigzag(axis, (q, k, v, ids))
        options = {"scale": 0.5, "initial_state": state, "segment_ids": ids}
        o, state = sequence.lightning_attention(q, k, v, SLOPES, axis_name=axis, **options)
        return to_natural(axis, [o])[0], state

    operands = {"q": q, "k": k, "v": v, "ids": ids, "state": state}
    return over_seq(run, shards, operands, SPECS, (P(None, "seq"), P()))


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, q, k, v, state, do, dstate, ids):
    results, pull = jax.vjp(lambda *x: function(*x, ids), q, k, v, state)
    return (*results, *pull((do, dstate)))


@functools.cache
def sharded(shards):
    return functools.partial(on_shards, shards)


def check(shards, ids, state=True):
    inputs = [x if state or i != 3 else None for i, x in enumerate(arrays())]
    with jax.enable_x64(True):
        wide = [None if x is None else np.asarray(x, np.float64) for x in inputs]
        right = [np.asarray(x) for x in with_gradients(on_one_device, *wide, ids) if x is not None]
    got = [x for x in with_gradients(sharded(shards), *inputs, ids) if x is not None]
    for name, a, b in zip(NAMES, got, right, strict=state):
        assert relative_error(a, b, 1.0) <= 1e-5, name
    if ids is not None:
        assert not np.asarray(got[0])[ids < 0].any()


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("shards", SHARDS)
def test_one_document(shards, state):
    check(shards, None, state)


@settings(max_examples=40)
@given(ids=segments(), shards=st.sampled_from(SHARDS))
def test_documents_padding_and_an_initial_state(ids, shards):
    check(shards, ids)


@pytest.mark.parametrize(
    "runs",
    [
        [(-1, 8), (0, 24)],  # the initial state passes whole shards of padding
        [(0, 4), (-1, 12), (0, 16)],  # and so does a document's
        [(0, 4), (-1, 12), (1, 16)],
        [(0, 8), (1, 8), (0, 16)],  # an id that comes again is another document
        [(0, 3), (1, 1), (0, 28)],
        [(-1, 32)],
    ],
)
def test_state_across_borders_of_blocks(runs):
    ids = np.concatenate([np.full(count, document, np.int32) for document, count in runs])
    check(4, np.stack([ids, np.zeros_like(ids)]))


@settings(max_examples=40)
@given(ids=segments(3, 150))
def test_the_state_without_outputs_is_the_kernels(ids):
    rng = np.random.default_rng(1)
    k, v = (rng.standard_normal((3, 150, HEADS, n)).astype(np.float32) for n in (KEYS, VALUES))
    for segment_ids in (ids, None):
        wanted = jax.jit(lightning.lightning_attention)(k, k, v, SLOPES, segment_ids=segment_ids)[1]
        got = jax.jit(lightning.lightning_state)(k, v, SLOPES, segment_ids=segment_ids)
        assert relative_error(got, wanted, 1.0) <= 1e-5
