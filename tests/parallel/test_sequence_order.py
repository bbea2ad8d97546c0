"""Zigzag order: what every shard holds, and that nothing is lost on the way there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sequence_cases import P, over_seq, zigzag

from hypenet_jax.parallel.sequence import order


def shuffled(function, x, shards):
    return over_seq(lambda axis, x: function(x, axis), shards, {"x": x}, {"x": P(None, "seq")}, P(None, "seq"))


@pytest.mark.parametrize("shards", range(1, 9))
def test_shard_j_holds_half_blocks_j_and_2n_minus_1_minus_j(shards):
    x = np.arange(2 * 6 * shards * 3, dtype=np.float32).reshape(2, 6 * shards, 3)
    there = shuffled(order.to_zigzag, x, shards)
    np.testing.assert_array_equal(there, zigzag(x, shards))
    np.testing.assert_array_equal(shuffled(order.to_natural, there, shards), x)


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_places_are_those_of_the_tokens_held(shards):
    held = zigzag(np.arange(4 * shards)[None], shards)[0].reshape(shards, 4)
    np.testing.assert_array_equal([order.places(shard, shards, 4) for shard in range(shards)], held)
    blocks = np.arange(2 * shards).reshape(1, 2 * shards)
    by_shard = zigzag(blocks, shards).reshape(shards, 1, 2)
    np.testing.assert_array_equal(order.in_natural_order(jnp.asarray(by_shard)), blocks.T)
    np.testing.assert_array_equal(order.by_shard(jnp.asarray(blocks.T)), by_shard)


def test_gradients_go_back_where_the_values_came_from():
    x, weights = (np.random.default_rng(i).standard_normal((1, 16, 2)).astype(np.float32) for i in (0, 1))
    gradient = jax.grad(lambda x: jnp.sum(shuffled(order.to_zigzag, x, 4) * zigzag(weights, 4)))(x)
    np.testing.assert_array_equal(gradient, weights)
