"""What one chunk of logits costs and its gradient in them, in plain JAX; the vocabulary may lie over a mesh axis."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Options(NamedTuple):
    """What is fixed while tracing. `tail` is "bucket" or "renormalise"; see `api.linear_kl`."""

    temperature: float = 1.0
    top_k: int | None = None
    tail: str = "bucket"
    vocab_axis: str | None = None
    token_chunk: int | None = None


class TopK(NamedTuple):
    """A teacher by its likeliest entries: indices int32 [..., k], log_probs [..., k], tail_mass [...] of the others."""

    indices: jax.Array
    log_probs: jax.Array
    tail_mass: jax.Array


def kl(options: Options, student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL(teacher || student) [...] of logits [..., V] and its gradient in the student's logits."""
    s, t = _below_max(options, student), _below_max(options, teacher)
    exp_s, exp_t = jnp.exp(s), jnp.exp(t)
    # Around their maxima, so that a large common offset of the logits costs no digits.
    sums = [jnp.sum(x, axis=-1) for x in (exp_s, exp_t, exp_t * (t - s))]
    sum_s, sum_t, cross = (_over_shards(options, x) for x in sums)
    loss = cross / sum_t + jnp.log(sum_s) - jnp.log(sum_t)
    return loss, (exp_s / sum_s[..., None] - exp_t / sum_t[..., None]) / options.temperature


def cross_entropy(options: Options, logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log softmax(logits)[label] [...], at temperature 1, and its gradient in the logits [..., V]."""
    z = _below_max(options._replace(temperature=1.0), logits)
    # A comparison and not a gather: it fuses, and stays local where the vocabulary is sharded.
    hot = labels[..., None] == jnp.arange(logits.shape[-1]) + first_entry(options, logits.shape[-1])
    total = _over_shards(options, jnp.sum(jnp.exp(z), axis=-1))
    loss = jnp.log(total) - _over_shards(options, jnp.sum(jnp.where(hot, z, 0.0), axis=-1))
    return loss, jnp.exp(z) / total[..., None] - hot


def kl_top_k(options: Options, student: jax.Array, teacher: TopK) -> tuple[jax.Array, jax.Array]:
    """KL over the teacher's k entries and, with the tail's mass, one bucket for all the others; and its gradient."""
    s = _below_max(options, student)
    inside, local = _local(options, teacher.indices, s.shape[-1])
    kept, probability = _scatter(local, jnp.exp(teacher.log_probs), s.shape)
    exp_s = jnp.exp(s)
    total = _over_shards(options, jnp.sum(exp_s, axis=-1))
    picked = jnp.take_along_axis(s, jnp.where(inside, local, 0), axis=-1)
    log_q = _over_shards(options, jnp.where(inside, picked, 0.0)) - jnp.log(total)[..., None]
    log_tail = _log_sum_exp(options, jnp.where(kept, -jnp.inf, s))
    mass = teacher.tail_mass
    probs = jnp.exp(teacher.log_probs)
    loss = jnp.sum(_times(probs, teacher.log_probs - log_q), axis=-1)
    loss += _times(mass, jnp.log(mass) - (log_tail - jnp.log(total)))
    # A cache rounds: the probabilities it brings may not sum to 1.
    whole = (jnp.sum(probs, axis=-1) + mass) / total
    in_tail = _times(mass[..., None], jnp.exp(s - log_tail[..., None]))
    gradient = exp_s * whole[..., None] - jnp.where(kept, probability, in_tail)
    return loss, gradient / options.temperature


def top_k(options: Options, teacher: jax.Array) -> TopK:
    """The teacher's `options.top_k` likeliest entries out of its logits [..., V]; exact, over all shards."""
    t, entries = _below_max(options, teacher), teacher.shape[-1]
    assert options.top_k is not None
    values, local = jax.lax.top_k(t, min(options.top_k, entries))
    indices = local + first_entry(options, entries)
    if options.vocab_axis is not None:
        gather = lambda x: jax.lax.all_gather(x, options.vocab_axis, axis=x.ndim - 1, tiled=True)  # noqa: E731
        values, place = jax.lax.top_k(gather(values), options.top_k)
        indices = jnp.take_along_axis(gather(indices), place, axis=-1)
    log_sum = _log_sum_exp(options, t)
    if options.tail == "renormalise":
        return TopK(indices, jax.nn.log_softmax(values), jnp.zeros_like(log_sum))
    kept, _ = _scatter(_local(options, indices, entries)[1], values, t.shape)
    tail = jnp.exp(_log_sum_exp(options, jnp.where(kept, -jnp.inf, t)) - log_sum)
    return TopK(indices, values - log_sum[..., None], tail)


def first_entry(options: Options, entries: int) -> jax.Array | int:
    """The vocabulary's index of this shard's first entry."""
    return 0 if options.vocab_axis is None else entries * jax.lax.axis_index(options.vocab_axis)


def _below_max(options: Options, logits: jax.Array) -> jax.Array:
    if options.temperature != 1.0:
        logits = logits / options.temperature
    return logits - _max(options, logits)[..., None]


def _max(options: Options, x: jax.Array) -> jax.Array:
    highest = jnp.max(x, axis=-1)
    return highest if options.vocab_axis is None else jax.lax.pmax(highest, options.vocab_axis)


def _over_shards(options: Options, x: jax.Array) -> jax.Array:
    return x if options.vocab_axis is None else jax.lax.psum(x, options.vocab_axis)


def _log_sum_exp(options: Options, x: jax.Array) -> jax.Array:
    """Of [..., V]; -inf where every entry is."""
    highest = _max(options, x)
    safe = jnp.where(highest == -jnp.inf, 0.0, highest)
    return safe + jnp.log(_over_shards(options, jnp.sum(jnp.exp(x - safe[..., None]), axis=-1)))


def _local(options: Options, indices: jax.Array, entries: int) -> tuple[jax.Array, jax.Array]:
    """Which indices are this shard's, and their places in it; `entries`, one beyond the last, for the others."""
    local = indices - first_entry(options, entries)
    inside = (local >= 0) & (local < entries)
    return inside, jnp.where(inside, local, entries)


def _scatter(local: jax.Array, values: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Bool [..., V], True at the k places, and the values there (0 elsewhere)."""
    rows = local.reshape(-1, local.shape[-1])
    place = (jnp.arange(rows.shape[0])[:, None], rows)
    flat = (rows.shape[0], shape[-1])
    kept = jnp.zeros(flat, bool).at[place].set(True, mode="drop")
    spread = jnp.zeros(flat, values.dtype).at[place].set(values.reshape(rows.shape), mode="drop")
    return kept.reshape(shape), spread.reshape(shape)


def _times(probability: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """The product, 0 where the probability is 0 whatever the other factor."""
    return jnp.where(probability > 0, probability * log_ratio, 0.0)
