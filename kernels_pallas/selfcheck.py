"""Run every backend of every kernel against its reference, gradients included: `hypenet doctor` prints the rows.

Gradients have gone wrong silently on some compiler versions, so a machine is checked by what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import api as attention
from kernels_pallas.cross_entropy import api as cross_entropy
from kernels_pallas.dispatch import Backend, Refused
from kernels_pallas.lightning import api as lightning

# Norm of the error over the norm of the reference; bfloat16 rounds operands and results (2^-9 at most each).
TOLERANCES = {"float32": 1e-5, "bfloat16": 6e-3}
CANCELLATION = 4


@dataclass(frozen=True)
class Row:
    """One check. `error` is NaN where the backend does not run here, and `check` then says why."""

    kernel: str
    backend: str
    check: str
    error: float
    tolerance: float
    ok: bool


@dataclass(frozen=True)
class Case:
    """A kernel on some inputs: `function(backend name, **inputs)`, differentiated in all of them.

    The inputs are float32 numbers that bfloat16 holds exactly, so that one reference serves both dtypes; those named in
    `float32_only` stay float32.
    """

    kernel: str
    backends: Mapping[str, Backend]
    function: Callable[..., Any]
    inputs: dict[str, jax.Array]
    float32_only: tuple[str, ...] = ()
    cancelling: tuple[str, ...] = ()  # results that are small differences of sums: CANCELLATION times the tolerance


def selfcheck(kernels: Collection[str] | None = None, seed: int = 0) -> list[Row]:
    """Rows for the named kernels (None: all) on small random inputs, on the default device.

    Takes some seconds a kernel, nearly all of them compilation.
    """
    cases = _cases(np.random.default_rng(seed))
    return [row for case in cases if kernels is None or case.kernel in kernels for row in _check(case)]


def relative_error(value: Any, expected: Any, floor: float = 1e-30) -> float:
    """Norm of the difference over the norm of what is expected (or `floor`); infinite for anything not finite."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    if not np.isfinite(value).all():
        return float("inf")
    return float(np.linalg.norm(value - expected)) / max(float(np.linalg.norm(expected)), floor)


def _check(case: Case) -> Iterator[Row]:
    expected = _results(case, "reference", case.inputs)
    for name in case.backends:
        for dtype, tolerance in TOLERANCES.items():
            if name == "reference":
                continue
            inputs = {n: x if n in case.float32_only else x.astype(dtype) for n, x in case.inputs.items()}
            try:
                results = _results(case, name, inputs)
            except Refused as refusal:
                reason = str(refusal).partition("call: ")[2]
                yield Row(case.kernel, name, f"{dtype}: {reason}", float("nan"), tolerance, True)
                continue
            for what, value in results.items():
                error = relative_error(value, expected[what])
                allowed = tolerance * (CANCELLATION if what in case.cancelling else 1)
                yield Row(case.kernel, name, f"{dtype}: {what}", error, allowed, error <= allowed)


def _results(case: Case, backend: str, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The outputs, and the gradients for fixed random cotangents."""

    def run(inputs):
        outputs, pull = jax.vjp(lambda inputs: case.function(backend, **inputs), inputs)
        rng = np.random.default_rng(1)
        cotangents = [jnp.asarray(rng.standard_normal(o.shape), jnp.bfloat16).astype(o.dtype) for o in outputs]
        return outputs, pull(tuple(cotangents))[0]

    outputs, gradients = jax.jit(run)(inputs)
    return {f"output {i}": o for i, o in enumerate(outputs)} | {f"d {name}": x for name, x in gradients.items()}


def _cases(rng: np.random.Generator) -> list[Case]:
    return [
        _lightning(rng),
        _simple_gla(rng),
        _attention(rng),
        _whole_rows(rng),
        _cached(rng),
        _kl(rng),
        _cross_entropy(rng),
    ]


def _random(rng: np.random.Generator, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    rounded = {name: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for name, shape in shapes.items()}
    return {name: x.astype(jnp.float32) for name, x in rounded.items()}


def _segments(batch: int, length: int) -> jax.Array:
    """Two documents a row, padding in front, between and behind."""
    places = np.arange(length)
    ids = np.where(places < length // 3, 0, 1)
    ids[(places < 5) | (abs(places - length // 2) < 3) | (places >= length - 7)] = -1
    return jnp.asarray(np.broadcast_to(ids, (batch, length)), jnp.int32)


def _lightning(rng: np.random.Generator) -> Case:
    batch, length, heads, width = 2, 200, 3, 64
    tokens = (batch, length, heads, width)
    inputs = _random(rng, q=tokens, k=tokens, v=tokens, initial_state=(batch, heads, width, width))

    def function(backend, q, k, v, initial_state):
        options = {"initial_state": initial_state, "segment_ids": _segments(batch, length), "backend": backend}
        return lightning.lightning_attention(q, k, v, lightning.slopes(heads), **options)

    return Case("lightning_attention", lightning.BACKENDS, function, inputs, ("initial_state",))


def _simple_gla(rng: np.random.Generator) -> Case:
    batch, length, heads, width = 2, 200, 3, 64
    tokens = (batch, length, heads, width)
    inputs = _random(rng, q=tokens, k=tokens, v=tokens, log_decay=tokens[:3])
    inputs["log_decay"] = -jnp.abs(inputs["log_decay"])

    def function(backend, q, k, v, log_decay):
        return lightning.simple_gla(q, k, v, log_decay, segment_ids=_segments(batch, length), backend=backend)

    return Case("simple_gla", lightning.BACKENDS, function, inputs, ("log_decay",), ("d log_decay",))


def _attention(rng: np.random.Generator) -> Case:
    batch, length, width = 2, 300, 64
    inputs = _random(rng, q=(batch, length, 4, width), k=(batch, length, 2, width), v=(batch, length, 2, width))
    growth = 1 + jnp.arange(length) / length

    def function(backend, q, k, v):
        options = {"segment_ids": _segments(batch, length), "logit_scale_T": growth, "backend": backend}
        return (attention.attention(q, k, v, **options),)

    return Case("attention", attention.BACKENDS, function, inputs)


def _whole_rows(rng: np.random.Generator) -> Case:
    """Without documents, which not every backend masks."""
    batch, length, width = 2, 256, 64
    inputs = _random(rng, q=(batch, length, 4, width), k=(batch, length, 2, width), v=(batch, length, 2, width))

    def function(backend, q, k, v):
        return (attention.attention(q, k, v, backend=backend),)

    return Case("attention, whole rows", attention.BACKENDS, function, inputs)


def _cached(rng: np.random.Generator) -> Case:
    batch, slots, width = 3, 300, 64
    inputs = _random(rng, q=(batch, 2, 4, width), k=(batch, slots, 2, width), v=(batch, slots, 2, width))
    positions = jnp.asarray([[0, 1], [280, 281], [40, -1]], jnp.int32)

    def function(backend, q, k, v):
        return (attention.cached_attention(q, k, v, positions, backend=backend),)

    return Case("cached_attention", attention.CACHED_BACKENDS, function, inputs)


def _kl(rng: np.random.Generator) -> Case:
    inputs = _head(rng)
    teacher = [x[::-1] for x in inputs.values()]
    mask = jnp.arange(len(inputs["hidden"])) % 7 != 3

    def function(backend, hidden, weight):
        far_hidden, far_weight = (x.astype(hidden.dtype) for x in teacher)
        return cross_entropy.linear_kl(hidden, weight, far_hidden, far_weight, mask, token_chunk=32, backend=backend)

    return Case("linear_kl", cross_entropy.KL_BACKENDS, function, inputs)


def _cross_entropy(rng: np.random.Generator) -> Case:
    inputs = _head(rng)
    tokens, vocabulary = len(inputs["hidden"]), inputs["weight"].shape[1]
    mask, labels = jnp.arange(tokens) % 7 != 3, jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32)

    def function(backend, hidden, weight):
        return cross_entropy.linear_cross_entropy(hidden, weight, labels, mask, token_chunk=32, backend=backend)

    return Case("linear_cross_entropy", cross_entropy.BACKENDS, function, inputs)


def _head(rng: np.random.Generator) -> dict[str, jax.Array]:
    inputs = _random(rng, hidden=(100, 64), weight=(64, 96))
    # Logits of order 1 keep the gradients well conditioned; an eighth is exact in bfloat16.
    return inputs | {"weight": inputs["weight"] / 8}
