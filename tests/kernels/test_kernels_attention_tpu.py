"""Attention on TPU: the contract through the interpreters, what the blocks visit, and what is refused."""

import functools
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import (
    BFLOAT16,
    FLOAT32,
    check,
    check_cached,
    check_that_blocks_merge,
    check_that_large_scores_stay_finite,
    check_that_padding_gives_zeros,
    check_that_parts_of_a_cache_merge,
    random_inputs,
    random_segments,
    segments,
)
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import attention, cached_attention, tpu, tpu_blocks
from kernels_pallas.attention.tpu_blocks import Blocks
from kernels_pallas.dispatch import Refused
from kernels_pallas.selfcheck import relative_error


@functools.cache
def _attention(*blocks):
    return functools.partial(tpu.attention, blocks=Blocks(*blocks) if blocks else None, interpret=True)


@hypothesis.given(ids=segments(2, 75), per_row=st.booleans())
def test_any_segments(ids, per_row):
    growth = np.linspace(0.5, 2, 150).astype(np.float32).reshape(2, 75)
    check(_attention(16, 32, 16), random_inputs(2, 75, 75, 4, 2, 32), segment_ids=ids, logit_scale=growth)


def test_short_documents_and_padding_within_them():
    ids, arrays = random_segments(2, 75), random_inputs(2, 75, 75, 4, 2, 32)
    growth = np.full((2, 75), 0.7, np.float32)
    check(_attention(16, 32, 16), arrays, segment_ids=ids, logit_scale=growth)
    check_that_padding_gives_zeros(_attention(16, 32, 16), arrays)


@pytest.mark.parametrize(
    ("shape", "blocks", "causal"),
    [
        ((1, 1, 1, 3, 3, 32), (), True),
        ((2, 40, 90, 3, 1, 32), (16, 16, 16), False),
        ((1, 300, 300, 2, 1, 128), (), True),
    ],
)
def test_shapes(shape, blocks, causal):
    check(_attention(*blocks), random_inputs(*shape), causal=causal)


def test_wide_heads_and_large_scores():
    check_that_large_scores_stay_finite(_attention(32, 32, 32), random_inputs(1, 60, 60, 1, 1, 256))


def test_bfloat16():
    arrays, growth = random_inputs(2, 200, 200, 4, 2, 64, dtype=jnp.bfloat16), np.linspace(1, 2, 200).astype(np.float32)
    ids = random_segments(2, 200, new_document=0.01)
    check(_attention(64, 64, 64), arrays, scale=0.125, segment_ids=ids, logit_scale=growth, tolerance=BFLOAT16)


@hypothesis.settings(max_examples=3)
@hypothesis.example(ids=np.repeat([[0, 1]], [384, 128], axis=1).astype(np.int32))
@hypothesis.given(ids=segments(1, 512))
def test_tiles_of_a_pair_of_blocks(ids):
    """Blocks of two grains of queries and two parts of keys: tiles that meet, need no mask, or are passed over."""
    with (
        mock.patch.object(tpu, "FORWARD_BLOCKS", Blocks(512, 512, 128)),  # halved for float32
        mock.patch.object(tpu, "BACKWARD_BLOCKS", Blocks(256, 512, 128)),
    ):
        check(_attention(), random_inputs(1, 512, 512, 2, 1, 32), segment_ids=ids)


def test_no_copy_races_with_the_work():
    # Two key heads of two query heads and several blocks: sums of dq are read, written and used again.
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
    function = functools.partial(tpu.attention, blocks=Blocks(16, 16, 16), interpret=interpret)
    ids = np.repeat([[0, 0, 1]], 16, axis=1).reshape(1, 48).astype(np.int32)
    check(function, random_inputs(1, 48, 48, 2, 1, 32), segment_ids=ids)
    assert not _races_found()


def _races_found():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


def test_blocks_that_do_not_meet_are_not_read():
    q, k, v, _ = random_inputs(1, 64, 64, 2, 2, 32)
    v[:, 16:32] = np.nan  # visited and masked, it would still make 0 * NaN
    ids = np.repeat([[0, 1, 2, 2]], 16, axis=1).reshape(1, 64).astype(np.int32)
    o = tpu.attention(
        q, k, v, causal=True, segment_ids=ids, scale=0.3, logit_scale=None, blocks=Blocks(16, 16, 16), interpret=True
    )
    assert np.isnan(o[:, 16:32]).all() and np.isfinite(np.delete(o, range(16, 32), axis=1)).all()


BLOCK_FUNCTIONS = [
    functools.partial(function, blocks=Blocks(16, 16, 16), interpret=True)
    for function in (tpu.attend_block, tpu.block_gradients)
]


@pytest.mark.parametrize("q_start", [0, 40, 64])
def test_blocks_of_keys_merge_to_the_whole(q_start):
    check_that_blocks_merge(*BLOCK_FUNCTIONS, q_start)


BLOCKS = Blocks(8, 32, 16)


@jax.jit
def _tables(last, ids, key_ids):
    # Three grains at a time, so that the loops over them run more than once and the last is not full.
    with mock.patch.multiple(tpu_blocks, GRAINS=3, SPANS=3):
        rows = tpu_blocks.rows(last, ids, jnp.ones(ids.shape), key_ids, BLOCKS)
        return rows, tpu_blocks.tables(rows, BLOCKS)


@hypothesis.given(ids=segments(2, 60), shuffled=st.booleans(), ahead=st.integers(-70, 70))
def test_every_pair_that_meets_is_visited(ids, shuffled, ahead):
    if shuffled:  # ids in any order, and documents that come back
        ids = np.where(ids >= 0, ids * 7 % 4, ids)
    last = np.broadcast_to(np.clip(ahead + np.arange(60), -1, 59), ids.shape)
    rows, tables = jax.tree.map(np.asarray, _tables(last, ids, ids))
    last, ids, key_ids = rows.last_B1T[:, 0], rows.ids_B1T[:, 0], rows.key_ids_B1S[:, 0]
    assert (last[ids < 0] == -1).all()
    seen = (np.arange(key_ids.shape[1]) <= last[:, :, None]) & (ids[:, :, None] == key_ids[:, None])
    seen = seen.reshape(2, -1, 8, key_ids.shape[1] // 16, 16)
    by_query, by_key = ({name: getattr(tables, name).reshape(2, -1) for name in names} for names in _NAMES)
    for b, i, j in np.ndindex(2, seen.shape[1], seen.shape[3]):
        query, key = ({name: x[b, n] for name, x in by.items()} for n, by in ((i, by_query), (j, by_key)))
        if seen[b, i, :, j].any():
            assert query["query_first"] <= j < query["query_end"] and key["key_first"] <= i < key["key_end"]
        if key["key_first"] <= i < key["key_end"]:
            assert query["visited_first"] <= j // 2 < query["visited_end"]
        if query["query_only"] == key["key_only"] and 16 * (j + 1) <= query["query_reach"] + 1:
            assert seen[b, i, :, j].all()
    # A block of keys takes two grains of them, and visits the queries between the first and last of either.
    first, end = (of(by_key[n].reshape(2, -1, 2), 2) for of, n in ((np.min, "key_first"), (np.max, "key_end")))
    assert (end <= by_query["visited_end"].shape[1]).all()
    for b, i in np.ndindex(by_query["visited_end"].shape):
        ends = by_query["visited_first"][b, i], by_query["visited_end"][b, i]
        visits = [j for j in range(first.shape[1]) if first[b, j] <= i < end[b, j]]
        assert ends == ((visits[0], visits[-1] + 1) if visits else (first.shape[1], 0))


def test_what_does_not_meet_has_no_span():
    ids = np.asarray([[-1] * 8 + [0] * 24, [0] * 32], np.int32)
    _, tables = _tables(np.arange(32)[None].repeat(2, 0), ids, np.where(ids < 0, -1, 0)[::-1])
    first, end = np.asarray(tables.query_first).reshape(2, -1), np.asarray(tables.query_end).reshape(2, -1)
    assert (first[0, 0], end[0, 0]) == (2, 0) and (first[0, 1:] == 0).all() and (end[0, 1:] == [1, 2, 2]).all()
    assert (end[1] == [1, 1, 2, 2]).all()


_NAMES = (
    ("query_first", "query_end", "query_only", "query_reach", "visited_first", "visited_end"),
    ("key_first", "key_end", "key_only"),
)


def test_documents_bound_the_work():
    ids = np.repeat(np.arange(16), 32)[None].astype(np.int32)
    rows = tpu_blocks.rows(np.arange(512)[None], ids, np.ones((1, 512)), ids, Blocks(16, 16, 16))
    tables = tpu_blocks.tables(rows, Blocks(16, 16, 16))
    assert int(jnp.sum(tables.query_end - tables.query_first)) == 16 * 3
    assert int(jnp.sum(tables.key_end - tables.key_first)) == 16 * 3


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((3, 1, 300, 4, 2, 32), 64),
        ((2, 2, 77, 6, 3, 32), 32),
        ((2, 3, 300, 2, 1, 128), None),
        ((1, 1, 1, 2, 2, 32), None),
    ],
)
def test_cache(shape, block):
    batch, length, slots = shape[:3]
    rng = np.random.default_rng(1)
    positions = np.sort(rng.integers(0, slots, (batch, length)), axis=1).astype(np.int32)
    positions[0, 0], positions[-1, -1] = -1, slots - 1
    growth = rng.uniform(1, 2, (batch, length)).astype(np.float32)
    function = functools.partial(tpu.cached_attention, block=block, interpret=True)
    check_cached(function, random_inputs(*shape), positions, logit_scale=growth)
    if length == 3:
        arrays = random_inputs(*shape, dtype=jnp.bfloat16)
        check_cached(function, arrays, positions, logit_scale=growth, tolerance=BFLOAT16)


def test_a_chunk_of_a_prompt_against_a_cache():
    positions = np.stack([np.arange(130) + 60, np.r_[np.arange(100), [-1] * 30]]).astype(np.int32)
    function = functools.partial(tpu.cached_attention, interpret=True)
    check_cached(function, random_inputs(2, 130, 200, 2, 1, 32), positions, logit_scale=None)


@pytest.mark.parametrize("length", [2, 80])
def test_parts_of_a_cache_merge(length):
    check_that_parts_of_a_cache_merge(functools.partial(tpu.attend_cache, interpret=True), length)


def test_each_row_reads_its_own_part_of_the_cache():
    q, k, v, _ = random_inputs(2, 1, 128, 2, 2, 32)
    v[0, 16:], v[1, 96:] = np.nan, np.nan
    options = {"scale": 0.3, "logit_scale": None, "block": 16, "interpret": True}
    o = tpu.cached_attention(q, k, v, jnp.asarray([[15], [95]], jnp.int32), **options)
    assert np.isfinite(o).all()


def test_gradients_through_a_cache():
    q, k, v, do = random_inputs(1, 1, 20, 2, 2, 32)
    positions = jnp.asarray([[13]], jnp.int32)
    options = {"scale": 0.3, "logit_scale": None, "interpret": True}
    _, pull = jax.vjp(lambda q, k, v: tpu.cached_attention(q, k, v, positions, **options), q, k, v)
    _, right = jax.vjp(lambda q, k, v: cached_attention(q, k, v, positions, scale=0.3, backend="reference"), q, k, v)
    for got, wanted in zip(pull(jnp.asarray(do)), right(jnp.asarray(do)), strict=True):
        assert relative_error(got, wanted) <= FLOAT32


def test_it_says_what_it_refuses(monkeypatch):
    q, k, v, _ = random_inputs(1, 4, 4, 2, 2, 32)
    with pytest.raises(Refused, match="'tpu' of attention refuses this call: it runs on TPU and this is cpu"):
        attention(q, k, v, backend="tpu")
    with pytest.raises(Refused, match="it runs on TPU and this is cpu"):
        cached_attention(q, k, v, jnp.zeros((1, 4), jnp.int32), backend="tpu")
    monkeypatch.setattr(tpu.compat, "platform", lambda: "tpu")

    def refusal(batch, length, width, dtype=jnp.bfloat16):
        x = jax.ShapeDtypeStruct((batch, length, 8, width), dtype)
        return tpu.refuses(q_BTHD=x, k_BSKD=x, v_BSKD=x)

    assert refusal(1, 2**20, 128) is None and refusal(8, 2**20, 128) is None and refusal(64, 131072, 128) is None
    assert "the heads of q are 48 wide" in refusal(1, 128, 48)
    assert "q is float16" in refusal(1, 128, 64, jnp.float16)
    assert "more blocks than scalar memory holds" in refusal(64, 2**20, 128)
