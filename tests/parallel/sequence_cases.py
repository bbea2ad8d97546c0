"""What the tests of sequence parallelism share: rows of documents and padding, and a mesh whose devices split them."""

import functools

import hypothesis.strategies as st
import jax
import numpy as np

from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.parallel.sequence import order

P = jax.sharding.PartitionSpec
SHARDS = (2, 4, 8)
BATCH, LENGTH = 2, 32


@st.composite
def segments(draw, batch=BATCH, length=LENGTH):
    """Any rows of documents, starting anywhere, and of padding; an id may come again after another one."""
    runs = st.lists(st.tuples(st.integers(-1, 3), st.integers(1, length)), min_size=1, max_size=8)
    rows = []
    for _ in range(batch):
        row = np.concatenate([np.full(count, document) for document, count in draw(runs)])
        rows.append(np.pad(row, (0, length), constant_values=-1)[:length])
    return np.stack(rows).astype(np.int32)


def over_seq(function, shards, operands, specs, out_specs):
    """function(axis name, **parts), in `shard_map`, of the operands that are there."""
    operands = {name: x for name, x in operands.items() if x is not None}
    mesh = make_mesh({"seq": shards}, jax.devices()[:shards])
    specs = {name: specs[name] for name in operands}
    run = functools.partial(function, "seq")
    mapped = jax.shard_map(lambda local: run(**local), mesh=mesh, in_specs=(specs,), out_specs=out_specs)
    # One program: outside of jit every operation would be compiled by itself.
    return jax.jit(mapped)(operands)


def zigzag(x, shards):
    """The whole array with its half-blocks in the order in which shards hold them."""
    blocks = np.split(np.asarray(x), 2 * shards, axis=1)
    return np.concatenate([blocks[b] for j in range(shards) for b in (j, 2 * shards - 1 - j)], axis=1)


def moved(function, axis_name, arrays):
    return [None if x is None else function(x, axis_name) for x in arrays]


to_zigzag = functools.partial(moved, order.to_zigzag)
to_natural = functools.partial(moved, order.to_natural)
