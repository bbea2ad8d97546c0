"""`hypenet bench exchange`: attention over a divided sequence, by ring and by gather, on the devices that are here."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.workdir import write_json
from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.parallel.sequence import attention as sequence
from hypenet_jax.plan.table import MIB
from hypenet_jax.train.checkpoint import versions
from kernels_pallas import attention as kernels
from kernels_pallas.bench.timing import milliseconds

ONE = "one device"
COLUMNS = {
    "tokens": 10,
    "exchange": 12,
    "forward ms": 12,
    "with backward": 15,
    "over one device": 18,
    "gathered MiB": 14,
}


def bench_exchange(
    lengths: Sequence[int],
    *,
    heads: int = 16,
    kv_heads: int = 8,
    width: int = 128,
    json_file: str | None = None,
    say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Time one layer's causal attention to one row over all devices as seq, and whole on one device; JSON-able.

    Arrays are random, bfloat16 (float32 on a CPU), with the ids of one document, as in training. "with backward" is
    forward and the gradients of queries, keys and values. "gathered" are the keys and values of the whole row, which
    `exchange="auto"` goes by.

    Args:
      lengths: tokens of the row, each measured.

    Raises:
      HypenetError: one device alone, a length that does not divide into two half-blocks a device, heads that do not
        divide, or a size below 1.
    """
    shards = len(jax.devices())
    if shards == 1:
        raise HypenetError("there is 1 device here, and an exchange is between several; run it where there are more")
    for name, value in (("heads", heads), ("kv_heads", kv_heads), ("width", width)):
        if value < 1:
            raise HypenetError(f"{name} is {value}; it must be at least 1")
    if heads % kv_heads:
        raise HypenetError(f"{heads} query heads do not divide over {kv_heads} key heads; give a multiple of them")
    for length in lengths:
        if length < 1 or length % (2 * shards):
            raise HypenetError(f"a row of {length} tokens does not divide into {2 * shards} half-blocks; change it")
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "shards": shards, "versions": versions()}
    result |= {"heads": heads, "kv_heads": kv_heads, "width": width, "rows": []}
    say(f"{shards} x {result['device']}, {heads} query and {kv_heads} key heads of width {width}")
    say("".join(name.ljust(columns) for name, columns in COLUMNS.items()).rstrip())
    for length in lengths:
        alone: list[float] = []
        for exchange in (ONE, "ring", "gather"):
            times = _times(exchange, length, heads, kv_heads, width)
            alone = alone or times
            record = {"tokens": length, "exchange": exchange, "forward_ms": times[0], "with_backward_ms": times[1]}
            record |= {"speedup": [one / it for one, it in zip(alone, times, strict=True)]}
            record |= {"gathered_bytes": 2 * length * kv_heads * width * _dtype().itemsize}
            result["rows"].append(record)
            say(_line(record))
            if json_file:
                write_json(pathlib.Path(json_file), result)
    return result


def _dtype() -> Any:
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def _line(record: dict[str, Any]) -> str:
    cells = [f"{record['tokens']:,}", record["exchange"]]
    cells += [f"{record['forward_ms']:.3f}", f"{record['with_backward_ms']:.3f}"]
    cells += ["{:.2f}x, {:.2f}x".format(*record["speedup"]), f"{record['gathered_bytes'] / MIB:.0f}"]
    return "".join(cell.ljust(columns) for cell, columns in zip(cells, COLUMNS.values(), strict=True)).rstrip()


def _times(exchange: str, length: int, heads: int, kv_heads: int, width: int) -> list[float]:
    """Milliseconds of [forward, forward and backward]."""
    devices = jax.devices()[:1] if exchange == ONE else jax.devices()
    mesh = make_mesh({"seq": len(devices)}, devices)
    tokens = PartitionSpec(None, "seq")
    sharding = NamedSharding(mesh, tokens)
    shapes = [(1, length, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    q, k, v, do = (_random(shape, number, sharding) for number, shape in enumerate(shapes))
    ids = jax.device_put(np.zeros((1, length), np.int32), sharding)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=tokens, out_specs=tokens)
    def attend(q, k, v, ids):
        if exchange == ONE:
            return kernels.attention(q, k, v, segment_ids=ids)
        return sequence.attention(q, k, v, axis_name="seq", exchange=exchange, segment_ids=ids)

    def gradients(q, k, v, ids, do):
        return jax.vjp(lambda *qkv: attend(*qkv, ids), q, k, v)[1](do)

    return [milliseconds(jax.jit(attend), q, k, v, ids), milliseconds(jax.jit(gradients), q, k, v, ids, do)]


def _random(shape: tuple[int, ...], seed: int, sharding: NamedSharding) -> jax.Array:
    draw = jax.jit(lambda key: jax.random.normal(key, shape, _dtype()), out_shardings=sharding)
    return draw(jax.random.key(seed))
