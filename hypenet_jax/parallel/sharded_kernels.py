"""The kernels under a mesh: each device calls them on its own rows and heads, which no partitioner could arrange.

Rows lie over dcn, data and fsdp, heads and the loss's vocabulary over tensor. Without a mesh of several devices, within
`shard_map` and where positions are split (seq > 1) these functions are the kernels themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from hypenet_jax.errors import HypenetError
from hypenet_jax.parallel.activations import divided_mesh, dividing_axes
from kernels_pallas import attention as attention_kernels
from kernels_pallas import cross_entropy as losses
from kernels_pallas import lightning as lightning_kernels

TENSOR = "tensor"


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    logit_scale_T: jax.Array | None = None,
) -> jax.Array:
    """`kernels_pallas.attention.attention`, causal. Key heads that tensor does not divide are repeated until it does.

    Raises:
      HypenetError: the query heads do not divide over tensor.
    """
    mesh = divided_mesh()
    if mesh is None:
        return attention_kernels.attention(q_BTHD, k_BSKD, v_BSKD, segment_ids=segment_ids, logit_scale_T=logit_scale_T)
    rows, heads = _rows_and_heads(q_BTHD, mesh)
    operands: dict[str, Any] = {"q_BTHD": q_BTHD, **_key_heads(k_BSKD, v_BSKD, heads, mesh)}
    operands |= {"segment_ids": segment_ids, "logit_scale_T": logit_scale_T}
    specs = {name: P(rows, None, heads) for name in ("q_BTHD", "k_BSKD", "v_BSKD")} | {"segment_ids": P(rows)}
    specs["logit_scale_T"] = _scale_spec(logit_scale_T, rows)
    return _on_each_device(attention_kernels.attention, mesh, operands, specs, P(rows, None, heads))


def cached_attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    q_positions_BT: jax.Array,
    *,
    logit_scale_BT: jax.Array | None = None,
) -> jax.Array:
    """`kernels_pallas.attention.cached_attention`; heads and errors as in `attention`."""
    mesh = divided_mesh()
    if mesh is None:
        return attention_kernels.cached_attention(q_BTHD, k_BSKD, v_BSKD, q_positions_BT, logit_scale_BT=logit_scale_BT)
    rows, heads = _rows_and_heads(q_BTHD, mesh)
    operands: dict[str, Any] = {"q_BTHD": q_BTHD, **_key_heads(k_BSKD, v_BSKD, heads, mesh)}
    operands |= {"q_positions_BT": q_positions_BT, "logit_scale_BT": logit_scale_BT}
    specs = {name: P(rows, None, heads) for name in ("q_BTHD", "k_BSKD", "v_BSKD")} | {"q_positions_BT": P(rows)}
    specs["logit_scale_BT"] = _scale_spec(logit_scale_BT, rows)
    return _on_each_device(attention_kernels.cached_attention, mesh, operands, specs, P(rows, None, heads))


def lightning_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    slopes_H: np.ndarray,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels_pallas.lightning.lightning_attention`; every device has the slopes and states of its own heads.

    Raises:
      HypenetError: the heads do not divide over tensor.
    """
    mesh = divided_mesh()
    operands: dict[str, Any] = {"q_BTHK": q_BTHK, "k_BTHK": k_BTHK, "v_BTHV": v_BTHV, "slopes_H": slopes_H}
    operands |= {"initial_state": initial_state, "segment_ids": segment_ids}
    if mesh is None:
        return lightning_kernels.lightning_attention(**operands, scale=scale)
    rows, heads = _rows_and_heads(q_BTHK, mesh)
    specs = {name: P(rows, None, heads) for name in ("q_BTHK", "k_BTHK", "v_BTHV")}
    specs |= {"slopes_H": P(heads), "initial_state": P(rows, heads), "segment_ids": P(rows)}

    def run(**local: Any) -> tuple[jax.Array, jax.Array]:
        return lightning_kernels.lightning_attention(**local, scale=scale)

    return _on_each_device(run, mesh, operands, specs, (P(rows, None, heads), P(rows, heads)))


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
    rows = dividing_axes("batch", tokens["mask"].shape[0], mesh)
    # Columns that do not divide are whole on every device, which then makes the same loss.
    vocabulary = min(math.gcd(weight.shape[1], _size(mesh)) for weight in weights.values())
    columns = TENSOR if 1 < _size(mesh) == vocabulary else None
    specs = {name: P(rows or None) for name in tokens} | {name: P(None, columns) for name in weights}

    def run(**local: Any) -> tuple[jax.Array, jax.Array]:
        mean, count = loss(**local, **options, vocab_axis=columns)
        total = jax.lax.psum(count, rows) if rows else count
        weighted = jax.lax.psum(mean * count, rows) if rows else mean * count
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


def _scale_spec(scale: jax.Array | None, rows: tuple[str, ...] | None) -> P:
    return P(rows) if scale is not None and scale.ndim == 2 else P()
