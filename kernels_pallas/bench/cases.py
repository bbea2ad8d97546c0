"""What is measured: every kernel at the shapes of HypeNet's training and decoding, by every backend that takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import api as attention
from kernels_pallas.bench import peers
from kernels_pallas.cross_entropy import api as cross_entropy
from kernels_pallas.lightning import api as lightning

KERNELS = ("lightning", "attention", "decode", "linear_kl")
LIGHTNING_SHAPES = [(1, 131072, 16), (8, 4096, 16), (1, 32768, 16), (1, 131072, 32)]  # batch, tokens, heads
HEADS, KV_HEADS, WIDTH = 16, 8, 128


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    `implementations` by name take the arrays of `inputs()`. Exactly one of `bytes` and `flops` is not 0: the work that
    the share of a ceiling is reckoned with.
    """

    kernel: str
    shape: str
    inputs: Callable[[], tuple[jax.Array, ...]]
    implementations: Mapping[str, Callable[..., Any]]
    bytes: float = 0.0
    flops: float = 0.0


def cases(kernels: tuple[str, ...], small: bool) -> Iterator[Case]:
    """The cases of the named kernels; `small` ones take seconds on a CPU."""
    if "lightning" in kernels:
        shapes = [(1, 2048, 2)] if small else LIGHTNING_SHAPES
        for shape in shapes:
            yield from _lightning(*shape, documents=False)
        yield from _lightning(*shapes[0], documents=True)
        if not small:
            yield from _lightning(1, 524288, 16, documents=False)
    if "attention" in kernels:
        for batch, length in [(1, 1024)] if small else [(4, 8192), (1, 32768), (1, 131072)]:
            yield from _attention(batch, length, False)
        yield from _attention(1, 1024 if small else 32768, True)
    if "decode" in kernels:
        for batch, slots in [(1, 4096)] if small else [(1, 131072), (8, 131072), (1, 524288), (8, 524288)]:
            yield _decode(batch, slots)
    if "linear_kl" in kernels:
        yield _linear_kl(*((256, 128, 1000) if small else (16384, 2048, 151936)))


def _random(*shapes: tuple[int, ...]) -> Callable[[], tuple[jax.Array, ...]]:
    keys = [jax.random.key(i) for i in range(len(shapes))]
    return lambda: tuple(jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True))


def _with_documents(*shapes: tuple[int, ...]) -> Callable[[], tuple[jax.Array, ...]]:
    """Random arrays, the last the cotangent of the output, then the ids of about one document a thousand tokens.

    The ids are an argument also where they are not used: in a program they would be constants, and XLA would spend
    minutes on computing all that follows from them.
    """
    arrays = _random(*shapes)

    def inputs() -> tuple[jax.Array, ...]:
        begins = jax.random.uniform(jax.random.key(9), shapes[0][:2]) < 1e-3
        return *arrays(), jnp.cumsum(begins, axis=1, dtype=jnp.int32)

    return inputs


def _one_way(forward: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda q, k, v, cotangent, ids: forward(q, k, v, ids)


def _both_ways(forward: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The output and the gradients in q, k and v."""

    def run(q, k, v, cotangent, ids):
        output, pull = jax.vjp(lambda q, k, v: forward(q, k, v, ids), q, k, v)
        return output, pull(cotangent)

    return run


def _lightning(batch: int, length: int, heads: int, documents: bool) -> Iterator[Case]:
    tokens = (batch, length, heads, WIDTH)
    unit = 2 * np.prod(tokens, dtype=float)  # bytes of one tensor
    slopes = lightning.slopes(heads)
    # XLA's scan is an order of magnitude behind on an accelerator: once is enough.
    leave_out = {"reference", "xla"} if length * heads > 2**21 or batch > 1 else {"reference"}
    names = [name for name in lightning.BACKENDS if name not in leave_out]

    def function(backend: str, **options: Any) -> Callable[..., jax.Array]:
        def call(q, k, v, ids):
            options["segment_ids"] = ids if documents else None
            return lightning.lightning_attention(q, k, v, slopes, backend=backend, **options)[0]

        return call

    forward = {name: function(name) for name in names}
    if not documents and jax.default_backend() == "gpu":
        forward["gpu, 24 bits of memory"] = function("gpu", short_memory=24.0)
        forward |= peers.jax_linear_attention(slopes)
    shape = f"B{batch} T{length} H{heads}" + " documents" * documents
    # The floor of an exact scheme of two passes: q, k, v, o and k, v again; backward three such scans and a state pass.
    for way, wrap, units in (
        ("", _one_way, 6),
        (" + backward", _both_ways, 18),
    ):
        functions = {name: wrap(f) for name, f in forward.items()}
        yield Case("lightning" + way, shape, _with_documents(*[tokens] * 4), functions, bytes=units * unit)


def _attention(batch: int, length: int, documents: bool) -> Iterator[Case]:
    q, kv = (batch, length, HEADS, WIDTH), (batch, length, KV_HEADS, WIDTH)
    names = [name for name in attention.BACKENDS if name not in ("reference", "xla")]
    if jax.default_backend() == "cpu":
        names = ["xla"]

    def function(backend: str) -> Callable[..., jax.Array]:
        return lambda q, k, v, ids: attention.attention(
            q, k, v, segment_ids=ids if documents else None, backend=backend
        )

    forward = {name: function(name) for name in names} | ({} if documents else peers.tokamax_attention())
    shape = f"B{batch} T{length} H{HEADS}/{KV_HEADS}" + " documents" * documents
    # Causal: half of the two products forward, of five backward. Documents skip most of that, so their share means
    # nothing, and only the times compare.
    half = batch * HEADS * float(length) ** 2 * WIDTH
    for way, wrap, products in (("", _one_way, 2), (" + backward", _both_ways, 7)):
        functions = {name: wrap(f) for name, f in forward.items()}
        flops = 0 if documents else products * half
        yield Case("attention" + way, shape, _with_documents(q, kv, kv, q), functions, flops=flops)


def _decode(batch: int, slots: int) -> Case:
    q, kv = (batch, 1, HEADS, WIDTH), (batch, slots, KV_HEADS, WIDTH)
    names = [name for name in attention.CACHED_BACKENDS if name != "reference"]

    def inputs() -> tuple[jax.Array, ...]:
        return *_random(q, kv, kv)(), jnp.full((batch, 1), slots - 1, jnp.int32)

    def function(backend: str) -> Callable[..., jax.Array]:
        return lambda q, k, v, places: attention.cached_attention(q, k, v, places, backend=backend)

    shape = f"B{batch} keys {slots} H{HEADS}/{KV_HEADS}"
    functions = {name: function(name) for name in names}
    return Case("decode attention", shape, inputs, functions, bytes=4 * np.prod(kv, dtype=float))


def _linear_kl(tokens: int, width: int, vocabulary: int) -> Case:
    def inputs() -> tuple[jax.Array, ...]:
        hidden, weight, far_hidden, far_weight = _random(*[(tokens, width), (width, vocabulary)] * 2)()
        return hidden, weight * jnp.bfloat16(width**-0.5), far_hidden, far_weight * jnp.bfloat16(width**-0.5)

    def function(backend: str) -> Callable[..., Any]:
        def loss(hidden, weight, far_hidden, far_weight):
            mask = jnp.ones(tokens, bool)
            return cross_entropy.linear_kl(hidden, weight, far_hidden, far_weight, mask, backend=backend)[0]

        return jax.value_and_grad(loss, (0, 1))

    def products(hidden, weight, far_hidden, far_weight):
        """The four products alone, 2,048 tokens at a time: two of logits, and stand-ins for the gradients' two."""

        def chunk(total, x):
            here, far = x
            logits, far = here @ weight, far @ far_weight
            return total + jnp.matmul(here.T, logits, preferred_element_type=jnp.float32), far @ weight.T

        rows = min(tokens, 2048)
        xs = tuple(x.reshape(-1, rows, width) for x in (hidden, far_hidden))
        return jax.lax.scan(chunk, jnp.zeros((width, vocabulary)), xs)

    names = [name for name in cross_entropy.KL_BACKENDS if name != "reference"]
    functions = {name: function(name) for name in names} | {"its four products alone": products}
    shape = f"{tokens} tokens, D {width}, V {vocabulary}"
    return Case("linear_kl + backward", shape, inputs, functions, flops=8.0 * tokens * width * vocabulary)
