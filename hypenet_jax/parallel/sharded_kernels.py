"""The kernels under a mesh: each device calls them on its own rows and heads, which no partitioner could arrange.

Rows lie over dcn, data and fsdp, heads and the loss's vocabulary over tensor, positions over seq. Without a mesh of
several devices and within `shard_map` these functions are the kernels themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from hypenet_jax.errors import HypenetError
from hypenet_jax.parallel.activations import divided_mesh, dividing_axes, sequence_shards
from hypenet_jax.parallel.sequence import attention as sequence_attention
from hypenet_jax.parallel.sequence import cache as sequence_cache
from hypenet_jax.parallel.sequence import lightning as sequence_lightning
from hypenet_jax.parallel.sequence import order
from kernels_pallas import attention as attention_kernels
from kernels_pallas import cross_entropy as losses
from kernels_pallas import lightning as lightning_kernels

TENSOR, SEQ = "tensor", "seq"


def to_zigzag(arrays_BT: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arrays [B or 1,T,...] (or None), each device's part, from natural to zigzag order over seq; 2 * seq divides T."""
    return tuple(None if x is None else _reordered(order.to_zigzag, x) for x in arrays_BT)


def to_natural(x_BT: jax.Array) -> jax.Array:
    """The inverse of `to_zigzag`, of one array."""
    return _reordered(order.to_natural, x_BT)


def _reordered(function: Callable, x_BT: jax.Array) -> jax.Array:
    mesh = divided_mesh()
    assert mesh is not None  # the caller has found that positions are split
    spec = P(dividing_axes("batch", x_BT.shape[0], mesh) or None, SEQ)
    return _on_each_device(lambda x: function(x, SEQ), mesh, {"x": x_BT}, {"x": spec}, spec)


def along_rows(function: Callable[[jax.Array], Any], x_BT: jax.Array) -> Any:
    """function(x_BT), a tree of [B,T], of rows that every device of seq has whole: a few bytes a token.

    Of a running sum over divided positions XLA makes a loop that goes from token to token (jax 0.11 on a GPU: 65,536
    times for each of two halves of 131,072 tokens).
    """
    mesh = divided_mesh()
    if mesh is None:
        return function(x_BT)
    rows = P(dividing_axes("batch", x_BT.shape[0], mesh) or None)
    return _on_each_device(lambda x_BT: function(x_BT), mesh, {"x_BT": x_BT}, {"x_BT": rows}, rows)


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    logit_scale_T: jax.Array | None = None,
    exchange: str | None = None,
) -> jax.Array:
    """`kernels_pallas.attention.attention`, causal. Key heads that tensor does not divide are repeated until it does.

    With `exchange` tokens lie in zigzag order over seq (`sequence.attention`).

    Raises:
      HypenetError: the query heads do not divide over tensor.
    """
    mesh = divided_mesh()
    if mesh is None:
        return attention_kernels.attention(q_BTHD, k_BSKD, v_BSKD, segment_ids=segment_ids, logit_scale_T=logit_scale_T)
    rows, heads = _rows_and_heads(q_BTHD, mesh)
    operands: dict[str, Any] = {"q_BTHD": q_BTHD, **_key_heads(k_BSKD, v_BSKD, heads, mesh)}
    operands |= {"segment_ids": segment_ids, "logit_scale_T": logit_scale_T}
    length = None if exchange is None else SEQ
    tokens = P(rows, length, heads)
    specs = {name: tokens for name in ("q_BTHD", "k_BSKD", "v_BSKD")} | {"segment_ids": P(rows, length)}
    specs["logit_scale_T"] = P(length) if logit_scale_T is not None and logit_scale_T.ndim == 1 else P(rows, length)

    def run(**local: Any) -> jax.Array:
        if exchange is None:
            return attention_kernels.attention(**local)
        return sequence_attention.attention(**local, axis_name=SEQ, exchange=exchange)

    return _on_each_device(run, mesh, operands, specs, tokens)


def stored(cache_BSKD: jax.Array, new_BTKD: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """A cache of keys or values with the new tokens at their positions; -1 is padding, which is not stored.

    Position p is slot p; over seq slots are dealt out (`sequence.cache`), and `cached_attention` knows it.
    """
    if sequence_shards() > 1:
        mesh = divided_mesh()
        assert mesh is not None
        rows = dividing_axes("batch", cache_BSKD.shape[0], mesh) or None
        heads = dividing_axes("act_kv_heads", cache_BSKD.shape[2], mesh) or None
        operands = {"cache_BSKD": cache_BSKD, "new_BTKD": new_BTKD, "positions_BT": positions_BT}
        specs = {"cache_BSKD": P(rows, SEQ, heads), "new_BTKD": P(rows, None, heads), "positions_BT": P(rows)}
        run = partial(sequence_cache.stored, axis_name=SEQ)
        return _on_each_device(run, mesh, operands, specs, P(rows, SEQ, heads))
    row = jnp.arange(cache_BSKD.shape[0])[:, None]
    # Padding goes to a slot past the end, where mode="drop" discards it.
    slots = jnp.where(positions_BT >= 0, positions_BT, cache_BSKD.shape[1])
    return cache_BSKD.at[row, slots].set(new_BTKD.astype(cache_BSKD.dtype), mode="drop")


def cached_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_positions_BT: jax.Array,
    *,
    logit_scale_BT: jax.Array | None = None,
    split: bool = False,
) -> jax.Array:
    """`kernels_pallas.attention.cached_attention` of what `stored` has stored; heads and errors as in `attention`.

    With `split` the queries lie over seq, in any order.
    """
    mesh = divided_mesh()
    if mesh is None:
        return attention_kernels.cached_attention(q_BTHD, k_BSKD, v_BSKD, q_positions_BT, logit_scale_BT=logit_scale_BT)
    rows, heads = _rows_and_heads(q_BTHD, mesh)
    operands: dict[str, Any] = {"q_BTHD": q_BTHD, **_key_heads(k_BSKD, v_BSKD, heads, mesh)}
    operands |= {"q_positions_BT": q_positions_BT, "logit_scale_BT": logit_scale_BT}
    slots, length = SEQ if sequence_shards() > 1 else None, SEQ if split else None
    specs = {"q_BTHD": P(rows, length, heads), "k_BSKD": P(rows, slots, heads), "v_BSKD": P(rows, slots, heads)}
    specs |= {"q_positions_BT": P(rows, length), "logit_scale_BT": P(rows, length)}
    function = attention_kernels.cached_attention
    if slots:
        function = partial(sequence_cache.attention, axis_name=SEQ, split=split)
    return _on_each_device(function, mesh, operands, specs, P(rows, length, heads))


def lightning_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    slopes_H: np.ndarray,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    zigzag: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.lightning.lightning_attention`; every device has the slopes and states of its own heads.

    With `zigzag` tokens lie in zigzag order over seq; the states are those before and after the whole sequence.

    Raises:
      HypenetError: the heads do not divide over tensor.
    """
    mesh = divided_mesh()
    operands: dict[str, Any] = {"q_BTHK": q_BTHK, "k_BTHK": k_BTHK, "v_BTHV": v_BTHV, "slopes_H": slopes_H}
    operands |= {"initial_state": initial_state, "segment_ids": segment_ids}
    if mesh is None:
        return lightning_kernels.lightning_attention(**operands, scale=scale)
    rows, heads = _rows_and_heads(q_BTHK, mesh)
    length = SEQ if zigzag else None
    tokens = P(rows, length, heads)
    specs = {name: tokens for name in ("q_BTHK", "k_BTHK", "v_BTHV")}
    specs |= {"slopes_H": P(heads), "initial_state": P(rows, heads), "segment_ids": P(rows, length)}

    def run(**local: Any) -> tuple[jax.Array, jax.Array]:
        if zigzag:
            return sequence_lightning.lightning_attention(**local, scale=scale, axis_name=SEQ)
        return lightning_kernels.lightning_attention(**local, scale=scale)

    return _on_each_device(run, mesh, operands, specs, (tokens, P(rows, heads)))


def linear_kl(
    hidden_student: jax.Array,
    weight_student: jax.Array,
    hidden_teacher: jax.Array,
    weight_teacher: jax.Array,
    mask: jax.Array,
    *,
    temperature: float = 1.0,
    token_chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.cross_entropy.linear_kl` of [B,T,D]: mean and count are over all devices' tokens."""
    tokens = {"hidden_student": hidden_student, "hidden_teacher": hidden_teacher, "mask": mask}
    weights = {"weight_student": weight_student, "weight_teacher": weight_teacher}
    options = {"temperature": temperature, "token_chunk": token_chunk}
    return _mean_loss(losses.linear_kl, tokens, weights, options)


def linear_kl_from_top_k(
    hidden: jax.Array,
    weight: jax.Array,
    indices: jax.Array,
    log_probs: jax.Array,
    tail_mass: jax.Array,
    mask: jax.Array,
    *,
    token_chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.cross_entropy.linear_kl_from_top_k` of [B,T,D]: mean and count are over all devices' tokens."""
    tokens = {"hidden": hidden, "indices": indices, "log_probs": log_probs, "tail_mass": tail_mass, "mask": mask}
    return _mean_loss(losses.linear_kl_from_top_k, tokens, {"weight": weight}, {"token_chunk": token_chunk})


def linear_cross_entropy(
    hidden: jax.Array, weight: jax.Array, labels: jax.Array, mask: jax.Array, *, token_chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.cross_entropy.linear_cross_entropy` of [B,T,D]: mean and count are over all devices' tokens."""
    tokens = {"hidden": hidden, "labels": labels, "mask": mask}
    return _mean_loss(losses.linear_cross_entropy, tokens, {"weight": weight}, {"token_chunk": token_chunk})


def _mean_loss(loss: Callable, tokens: dict, weights: dict, options: dict) -> tuple[jax.Array, jax.Array]:
    mesh = divided_mesh()
    if mesh is None:
        return loss(**tokens, **weights, **options)
    rows, length = (
        dividing_axes(axis, size, mesh) for axis, size in zip(("batch", "length"), tokens["mask"].shape, strict=True)
    )
    divided = rows + length
    # Columns that do not divide are whole on every device, which then makes the same loss.
    vocabulary = min(math.gcd(weight.shape[1], _size(mesh)) for weight in weights.values())
    columns = TENSOR if 1 < _size(mesh) == vocabulary else None
    specs = {name: P(rows or None, length or None) for name in tokens}
    specs |= {name: P(None, columns) for name in weights}

    def run(**local: Any) -> tuple[jax.Array, jax.Array]:
        mean, count = loss(**local, **options, vocab_axis=columns)
        total = jax.lax.psum(count, divided) if divided else count
        weighted = jax.lax.psum(mean * count, divided) if divided else mean * count
        return weighted / jnp.maximum(total, 1.0), total

    return _on_each_device(run, mesh, tokens | weights, specs, (P(), P()))


def _on_each_device(function: Callable, mesh: AbstractMesh, operands: dict, specs: dict, out_specs: Any) -> Any:
    """function(**operands) in `shard_map` over every axis of the mesh; operands that are None stay away."""
    operands = {name: jnp.asarray(operand) for name, operand in operands.items() if operand is not None}
    specs = {name: specs[name] for name in operands}
    mapped = jax.shard_map(
        lambda local: function(**local), mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=True
    )
    return mapped(operands)


def _size(mesh: AbstractMesh) -> int:
    return mesh.shape.get(TENSOR, 1)


def _rows_and_heads(q_BTHD: jax.Array, mesh: AbstractMesh) -> tuple[tuple[str, ...] | None, str | None]:
    """The mesh axes of rows and of heads."""
    if q_BTHD.shape[2] % _size(mesh):
        raise HypenetError(
            f"the mixer has {q_BTHD.shape[2]} heads, which do not divide over the mesh axis tensor={_size(mesh)}; "
            "choose a mesh whose size divides them"
        )
    return dividing_axes("batch", q_BTHD.shape[0], mesh) or None, TENSOR if TENSOR in mesh.shape else None


def _key_heads(k_BSKD: jax.Array, v_BSKD: jax.Array, heads: str | None, mesh: AbstractMesh) -> dict[str, jax.Array]:
    """Keys and values with as many heads as tensor needs, neighbours alike: what a device's query heads read stays its.

    K and tensor both divide the query heads, so their least common multiple does too.
    """
    times = math.lcm(k_BSKD.shape[2], _size(mesh)) // k_BSKD.shape[2] if heads else 1
    repeated = (jnp.repeat(x, times, axis=2) if times > 1 else x for x in (k_BSKD, v_BSKD))
    return dict(zip(("k_BSKD", "v_BSKD"), repeated, strict=True))
