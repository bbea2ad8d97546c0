"""What a compiled step with divided positions holds and moves, read off the program for eight CPU devices."""

import re

import jax
import numpy as np
import pytest
from test_parallel_equality import STUDENT, draw

from hypenet_jax.halo.finetune import next_token_loss
from hypenet_jax.model import LanguageModel
from hypenet_jax.model.context import training_context
from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.parallel.rules import batch_sharding, param_shardings

# Of the kernels' blocks none is as long, not even with the rows of all heads of a group.
LENGTH, SHARDS = 4096, 4
MOVES = "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute"


def program(exchange):
    """The text of a step's program: 2 rows over data=2, LENGTH positions over seq=4."""
    mesh = make_mesh({"data": 2, "seq": SHARDS})
    model = LanguageModel(STUDENT.config, remat=True, exchange=exchange)
    params = draw(STUDENT, 0)
    params = jax.device_put(params, param_shardings(STUDENT.param_axes(), params, mesh))
    ones = np.ones((2, LENGTH), np.int32)
    batch = {"tokens": ones, "targets": ones, "segment_ids": 0 * ones, "loss_mask": ones > 0}
    step = jax.value_and_grad(next_token_loss(model, 64), has_aux=True)
    with jax.set_mesh(mesh):
        return jax.jit(step).lower(params, None, jax.device_put(batch, batch_sharding(mesh))).compile().as_text()


def shapes(text, operations="[a-z-]+"):
    """(type, sizes) of everything that such operations give."""
    for line in text.splitlines():
        if found := re.match(rf"\s*(?:ROOT )?%?[\w.-]+ = (.*?) (?:{operations})(?:-start)?\(", line):
            for kind, sizes in re.findall(r"([a-z]+\d+)\[([\d,]*)\]", found[1]):
                yield kind, [int(n) for n in sizes.split(",") if n]


@pytest.mark.parametrize("exchange", ["ring", "gather"])
def test_no_device_holds_scores_of_all_pairs_nor_what_another_could(exchange):
    text, config = program(exchange), STUDENT.config
    floats = [(kind, sizes) for kind, sizes in shapes(text) if kind in ("f32", "bf16")]
    assert len(floats) > 100
    # Not even the scores of one head among one shard's own tokens.
    assert max(int(np.prod(sizes)) for _, sizes in shapes(text)) < (LENGTH // SHARDS) ** 2
    # Of the whole length: keys and values of one attention layer with the gather, nothing at all with the ring.
    gathered = [int(np.prod(sizes)) for kind, sizes in shapes(text, "all-gather") if kind in ("f32", "bf16")]
    keys = LENGTH * config.num_kv_heads * config.head_dim
    assert set(gathered) == ({keys} if exchange == "gather" else set())
    whole = [sizes for _, sizes in floats if LENGTH in sizes]
    assert all(int(np.prod(sizes)) <= keys for sizes in whole) if exchange == "gather" else not whole


def test_tokens_are_counted_along_whole_rows():
    """The ids are gathered, and no more is asked of other devices: a divided running sum may be a loop of T steps."""
    mesh = make_mesh({"data": 2, "seq": SHARDS})
    ids = jax.ShapeDtypeStruct((2, LENGTH), np.int32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        count = jax.jit(lambda ids: training_context(ids, ids)[:2], out_shardings=batch_sharding(mesh))
        text = count.lower(ids).compile().as_text()
    assert list(shapes(text, MOVES)) == [("s32", [1, LENGTH])] and " while(" not in text
