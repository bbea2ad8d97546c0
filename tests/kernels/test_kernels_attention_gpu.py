"""Attention on a GPU: the contract through the interpreter and, with `-m gpu`, on the machine; what blocks visit."""

import functools

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

from kernels_pallas.attention import attention, cached_attention, cudnn, gpu, gpu_blocks, gpu_decode, reference
from kernels_pallas.attention.gpu import Sizes
from kernels_pallas.attention.gpu_blocks import Tiles
from kernels_pallas.dispatch import Refused
from kernels_pallas.selfcheck import relative_error

SMALL = Sizes(Tiles(32, 16, 4, 2), Tiles(16, 32, 4, 2), Tiles(32, 16, 4, 2))
SMALL_ATTENTION = functools.partial(gpu.attention, sizes=SMALL, interpret=True)
ATTENTION = functools.partial(gpu.attention, interpret=True)


@hypothesis.given(ids=segments(2, 75))
def test_any_segments(ids):
    growth = np.linspace(-0.5, 2, 150).astype(np.float32).reshape(2, 75)
    check(SMALL_ATTENTION, random_inputs(2, 75, 75, 6, 2, 24), segment_ids=ids, logit_scale=growth)


def test_short_documents_and_padding_within_them():
    ids, arrays = random_segments(2, 75), random_inputs(2, 75, 75, 6, 2, 24)
    check(SMALL_ATTENTION, arrays, segment_ids=ids, logit_scale=np.full((2, 75), 0.7, np.float32))
    check_that_padding_gives_zeros(SMALL_ATTENTION, arrays)


@pytest.mark.parametrize(
    ("shape", "causal", "segmented"),
    [
        ((1, 1, 1, 3, 3, 8), True, False),
        ((2, 40, 90, 3, 1, 32), False, False),
        ((2, 96, 96, 2, 1, 16), False, True),
        ((1, 300, 300, 2, 1, 128), True, False),
    ],
)
def test_shapes(shape, causal, segmented):
    ids = random_segments(*shape[:2], new_document=0.01, padding=0) if segmented else None
    function = ATTENTION if shape[1] == 300 else SMALL_ATTENTION
    check(function, random_inputs(*shape), causal=causal, segment_ids=ids, scale=-0.3)


def test_wide_heads_and_large_scores():
    check_that_large_scores_stay_finite(ATTENTION, random_inputs(1, 60, 60, 1, 1, 256))


def test_bfloat16():
    arrays, growth = random_inputs(2, 200, 200, 4, 2, 64, dtype=jnp.bfloat16), np.linspace(1, 2, 200).astype(np.float32)
    ids = random_segments(2, 200, new_document=0.01)
    check(ATTENTION, arrays, scale=0.125, segment_ids=ids, logit_scale=growth, tolerance=BFLOAT16)


def test_blocks_that_do_not_meet_are_not_read():
    q, k, v, do = random_inputs(1, 64, 64, 2, 2, 16)
    v[:, 16:32] = np.nan  # visited and masked, it would still make 0 * NaN
    ids = np.repeat([[0, 1, 2, 2]], 16, axis=1).reshape(1, 64).astype(np.int32)
    options = {"causal": True, "segment_ids": ids, "scale": 0.3, "logit_scale": None, "interpret": True}
    options["sizes"] = Sizes(*[Tiles(16, 16, 4, 2)] * 3)
    o, pull = jax.vjp(lambda q, k: gpu.attention(q, k, v, **options), q, k)
    for x in (o, *pull(jnp.asarray(do))):
        assert np.isnan(x[:, 16:32]).all() and np.isfinite(np.delete(x, range(16, 32), axis=1)).all()


@functools.partial(jax.jit, static_argnums=3)
def _spans(last, ids, key_ids, tiles):
    return gpu_blocks.spans(last, ids, key_ids, key_ids.shape[1], tiles)


@hypothesis.given(ids=segments(2, 60), shuffled=st.booleans(), ahead=st.integers(-70, 70))
def test_every_pair_that_meets_is_visited(ids, shuffled, ahead):
    if shuffled:  # ids in any order, and documents that come back
        ids = np.where(ids >= 0, ids * 7 % 4, ids)
    last = np.where(ids >= 0, np.clip(ahead + np.arange(60), -1, 59), -1).astype(np.int32)
    by_query, by_key = jax.tree.map(np.asarray, _spans(last, ids, ids, Tiles(8, 16, 4, 2)))
    seen = (np.arange(60) <= last[:, :, None]) & (ids[:, :, None] == ids[:, None])
    for b, i, j in np.ndindex(2, 8, 4):
        pair, counts = seen[b, i * 8 : (i + 1) * 8, j * 16 : (j + 1) * 16], last[b, i * 8 : (i + 1) * 8] >= 0
        for (first, end, whole, whole_end), place in ((by_query[b, i], j), (by_key[b, j], i)):
            assert whole == whole_end or first <= whole < whole_end <= end
            assert first <= place < end or not pair.any()
            assert pair[counts].all() and pair.shape[1] == 16 or not whole <= place < whole_end


def test_documents_bound_the_work():
    ids = jnp.repeat(jnp.arange(16), 32)[None]
    for found in _spans(jnp.arange(512)[None], ids, ids, Tiles(16, 16, 4, 2)):
        assert int(jnp.sum(found[..., 1] - found[..., 0])) == 16 * 3
        assert int(jnp.sum(found[..., 3] - found[..., 2])) == 16


BLOCK_FUNCTIONS = [
    functools.partial(function, sizes=SMALL, interpret=True) for function in (gpu.attend_block, gpu.block_gradients)
]


@pytest.mark.parametrize("q_start", [0, 40, 64])
def test_blocks_of_keys_merge_to_the_whole(q_start):
    check_that_blocks_merge(*BLOCK_FUNCTIONS, q_start)


def test_inside_shard_map():
    q, k, v, _ = random_inputs(2, 40, 40, 4, 2, 16)
    ids = random_segments(2, 40)

    def gradient(q, k, v, ids):
        def loss(q, k, v):
            o = SMALL_ATTENTION(q, k, v, causal=True, segment_ids=ids, scale=0.3, logit_scale=None)
            return jnp.sum(o**2)

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split, by_row = jax.P("data", None, "tensor"), jax.P("data")
    shard = functools.partial(jax.shard_map, gradient, mesh=mesh, in_specs=(split, split, split, by_row))
    jax.jit(shard(out_specs=split)).trace(q, k, v, ids)  # what varies over which axis; the interpreter does not know
    sharded = jax.jit(shard(out_specs=split, check_vma=False))
    for got, right in zip(sharded(q, k, v, ids), gradient(q, k, v, ids), strict=True):
        assert relative_error(got, right) <= FLOAT32


@pytest.mark.parametrize(
    ("shape", "splits"),
    [((3, 1, 300, 4, 2, 32), 3), ((2, 5, 77, 6, 2, 24), 2), ((2, 3, 300, 2, 1, 128), None), ((1, 1, 1, 2, 2, 8), 4)],
)
def test_cache(shape, splits):
    batch, length, slots = shape[:3]
    rng = np.random.default_rng(1)
    positions = np.sort(rng.integers(0, slots, (batch, length)), axis=1).astype(np.int32)
    positions[0, 0], positions[-1, -1] = -1, slots - 1
    growth = rng.uniform(-1, 2, (batch, length)).astype(np.float32)
    tiles = gpu_decode.Tiles(32, 4, 2, splits) if splits else None
    function = functools.partial(gpu_decode.cached_attention, tiles=tiles, interpret=True)
    check_cached(function, random_inputs(*shape), positions, logit_scale=growth)
    if splits is None:
        arrays = random_inputs(*shape, dtype=jnp.bfloat16)
        check_cached(function, arrays, positions, logit_scale=growth, tolerance=BFLOAT16)


def test_a_chunk_of_a_prompt_against_a_cache():
    positions = np.stack([np.arange(130) + 60, np.r_[np.arange(100), [-1] * 30]]).astype(np.int32)
    function = functools.partial(gpu.cached_attention, interpret=True)
    check_cached(function, random_inputs(2, 130, 200, 2, 1, 16), positions, logit_scale=None)


@pytest.mark.parametrize("length", [2, 80])
def test_parts_of_a_cache_merge(length):
    check_that_parts_of_a_cache_merge(functools.partial(gpu.attend_cache, interpret=True), length)


def test_each_row_reads_its_own_part_of_the_cache():
    q, k, v, _ = random_inputs(2, 1, 128, 2, 2, 16)
    v[0, 16:], v[1, 96:] = np.nan, np.nan
    options = {"scale": 0.3, "logit_scale": None, "tiles": gpu_decode.Tiles(16, 4, 2, 3), "interpret": True}
    assert np.isfinite(gpu_decode.cached_attention(q, k, v, jnp.asarray([[15], [95]], jnp.int32), **options)).all()


def test_gradients_through_a_cache():
    q, k, v, do = random_inputs(1, 1, 20, 2, 2, 16)
    positions = jnp.asarray([[13]], jnp.int32)
    options = {"scale": 0.3, "logit_scale": None}
    _, pull = jax.vjp(lambda q, k, v: gpu.cached_attention(q, k, v, positions, interpret=True, **options), q, k, v)
    _, right = jax.vjp(lambda q, k, v: reference.cached_attention(q, k, v, positions, **options), q, k, v)
    for got, wanted in zip(pull(jnp.asarray(do)), right(jnp.asarray(do)), strict=True):
        assert relative_error(got, wanted) <= FLOAT32


@pytest.mark.parametrize(("batch", "slots"), [(1, 131072), (8, 131072), (8, 524288), (1, 1000), (3, 10)])
def test_splits_fill_the_chip(batch, slots):
    cache, tiles = jax.ShapeDtypeStruct((batch, slots, 8, 128), jnp.bfloat16), gpu_decode.Tiles(64, 4, 3)
    splits = gpu_decode.splits_for(tiles, batch, cache)
    assert 1 <= splits <= max(1, slots // 256)
    if slots >= 131072:  # three programs of 72 KB on each of 132 multiprocessors
        assert 0.96 * 396 <= splits * batch * 8 <= 396


def test_it_says_what_it_refuses(monkeypatch):
    q, k, v, _ = random_inputs(1, 4, 4, 2, 2, 32)
    for backend in ("gpu", "cudnn"):
        if jax.default_backend() != "gpu":
            with pytest.raises(Refused, match=f"'{backend}' of attention refuses this call: it runs on a GPU and this"):
                attention(q, k, v, backend=backend)
    if jax.default_backend() != "gpu":
        with pytest.raises(Refused, match="it runs on a GPU and this is"):
            cached_attention(q, k, v, jnp.zeros((1, 4), jnp.int32), backend="gpu")
    monkeypatch.setattr(cudnn.compat, "platform", lambda: "gpu")

    def refusal(backend, width, dtype, segment_ids=None):
        x = jax.ShapeDtypeStruct((1, 128, 8, width), dtype)
        return backend.refuses(q_BTHD=x, k_BSKD=x, v_BSKD=x, causal=True, segment_ids=segment_ids)

    assert refusal(gpu.BACKEND, 128, jnp.bfloat16, q) is None
    assert "q is float16" in refusal(gpu.BACKEND, 128, jnp.float16)
    assert "q is 512 wide" in refusal(gpu.BACKEND, 512, jnp.float32)
    assert "no masks of documents" in refusal(cudnn.BACKEND, 128, jnp.bfloat16, q)
    assert "takes bfloat16 or float16" in refusal(cudnn.BACKEND, 128, jnp.float32)
    assert "takes one width up to 128" in refusal(cudnn.BACKEND, 256, jnp.bfloat16)
    if jax.default_backend() != "gpu":
        assert "cuDNN" in refusal(cudnn.BACKEND, 128, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("length", [1, 700, 1999])
def test_on_a_gpu_documents(width, dtype, length):
    arrays = random_inputs(2, length, length, 6, 2, width, seed=length, dtype=dtype)
    ids = random_segments(2, length, seed=width, new_document=0.004, padding=0.02)
    growth = np.linspace(0.5, 2, length).astype(np.float32)
    tolerance = FLOAT32 if dtype == jnp.float32 else BFLOAT16
    check(gpu.attention, arrays, scale=width**-0.5, segment_ids=ids, logit_scale=growth, tolerance=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("function", [gpu.attention, cudnn.attention])
@pytest.mark.parametrize(("causal", "length"), [(True, 2048), (True, 999), (False, 1500)])
def test_on_a_gpu_whole_sequences(function, causal, length):
    arrays = random_inputs(2, length, length, 8, 4, 128, dtype=jnp.bfloat16)
    options = {"causal": causal, "scale": 128**-0.5}
    if function is cudnn.attention and length % 2:
        assert "Unsupported sequence length" in cudnn.BACKEND.refuses(
            q_BTHD=arrays[0], k_BSKD=arrays[1], v_BSKD=arrays[2], causal=causal, segment_ids=None
        )
        return
    check(function, arrays, tolerance=BFLOAT16, **options)
    # cuDNN gets q scaled and rounded once more, which adds up in quadrature.
    once_more = 2**-9 / 3**0.5 if function is cudnn.attention else 0.0
    growth = np.linspace(1, 1.5, length).astype(np.float32)
    check(function, arrays, logit_scale=growth, tolerance=float(np.hypot(BFLOAT16, once_more)), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("length", "slots"), [(1, 30001), (4, 5000), (16, 999), (300, 2000)])
def test_on_a_gpu_cache(width, dtype, length, slots):
    rng = np.random.default_rng(0)
    positions = np.sort(rng.integers(0, slots, (3, length)), axis=1).astype(np.int32)
    positions[0, 0], positions[1, -1], positions[2] = -1, slots - 1, np.arange(length) + 17
    arrays = random_inputs(3, length, slots, 8, 2, width, dtype=dtype)
    growth = rng.uniform(0.5, 2, (3, length)).astype(np.float32)
    tolerance = FLOAT32 if dtype == jnp.float32 else BFLOAT16
    check_cached(gpu.cached_attention, arrays, positions, scale=width**-0.5, logit_scale=growth, tolerance=tolerance)
