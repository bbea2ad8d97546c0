"""The sweep of `sweep.py` with one Pallas-Triton kernel between the matrix products, which stay XLA's (cuBLAS).

What stands between the products moves bytes: float32 logits of student and teacher in, the gradient in the products'
dtype out. XLA reads the logits three times (maxima, sums, gradient). Here every program takes one block of one row into
registers, publishes the block's maxima and sums, waits for the row's other programs, and writes the block's gradient
from what it still holds: every logit is read once. The programs number themselves as they start (a ticket), so that
those a program waits for have always started before it or are the next to start: the wait ends on any GPU that holds
one row's programs at a time.
"""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas import compat
from kernels_pallas.cross_entropy import sweep
from kernels_pallas.cross_entropy.sweep import Static, Tokens
from kernels_pallas.cross_entropy.terms import Options, TopK
from kernels_pallas.dispatch import Backend

# Entries of the vocabulary a program and its warps, the best of those tried on an H100 (docs/decisions/0015).
BLOCK, ENTRIES_A_WARP = 4096, 512
STATISTICS = 5


def linear_loss(weight, weight_teacher, tokens: Tokens, *, options: Options, interpret: bool = False) -> jax.Array:
    """Sum over tokens of their shares of KL and cross entropy; see `sweep.total_loss`."""
    return _jitted(Static(options, _stages(interpret)), weight, weight_teacher, tokens)


def _stage(interpret: bool, options: Options, student, teacher, tokens: Tokens, gradient: bool, buffer, start):
    if not gradient:
        return sweep.plain_stage(options, student, teacher, tokens, gradient, buffer, start)
    student, kl_share, ce_share = student[0], tokens.kl_share, tokens.ce_share
    none = jnp.zeros(student.shape[0], jnp.float32)
    kl_share, ce_share = (none if share is None else share[0] for share in (kl_share, ce_share))
    labels = jnp.full(none.shape, -1) if tokens.labels is None else tokens.labels[0]
    scalars = (kl_share / options.temperature, ce_share, labels.astype(jnp.int32), jnp.reshape(start, 1))
    teacher = None if teacher is None else teacher[0]
    kl, log_sum, buffer = gradient_of_chunk(student, teacher, *scalars, buffer[0], options.temperature, interpret)
    loss = jnp.where(kl_share != 0, kl_share * kl, 0.0)
    if tokens.ce_share is not None:
        here = jnp.where(ce_share != 0, labels, 0)
        cross_entropy = log_sum - jnp.take_along_axis(student, here[:, None], axis=1)[:, 0]
        loss += jnp.where(ce_share != 0, ce_share * cross_entropy, 0.0)
    return loss, buffer[None]


@cache
def _stages(interpret: bool):
    return partial(_stage, interpret)


@partial(jax.jit, static_argnums=0)
def _jitted(static: Static, weight, weight_teacher, tokens: Tokens) -> jax.Array:
    axes = tokens.hidden.ndim - 1
    tokens = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[axes:]), tokens)
    return sweep.total_loss(static, weight, weight_teacher, tokens)


def gradient_of_chunk(student, teacher, kl_scale, ce_scale, labels, start, buffer, temperature, interpret=False):
    """The loss's gradient in the logits of a chunk, written into rows of a buffer, and what the loss needs.

    Args:
      student: float32 logits [N,V].
      teacher: the same, or None for cross entropy alone.
      kl_scale, ce_scale: float32 [N]; the gradient is `kl_scale * (p_s - p_t) + ce_scale * (p_s - onehot(label))` where
        p are the probabilities at the temperature (which cross entropy needs to be 1). Rows of zeros give zeros.
      labels: int32 [N], -1 for none.
      start: int32 [1], the buffer's first row that is written.
      buffer: [M,V], in the gradient's dtype; it is given back with N rows changed.

    Returns:
      KL [N] (0 without a teacher), the student's log-sum-exp [N], the buffer.
    """
    rows, entries = student.shape
    # The interpreter runs the programs one after the other, so that none may wait for a later one.
    block = pl.next_power_of_2(entries) if interpret else min(BLOCK, pl.next_power_of_2(entries))
    blocks = pl.cdiv(entries, block)
    counts = jnp.zeros(rows + 1, jnp.int32)
    inputs = [start, kl_scale, ce_scale, labels, counts, buffer, student] + ([] if teacher is None else [teacher])
    shapes = [(rows,), (rows,), (rows, STATISTICS, pl.next_power_of_2(blocks)), counts.shape, buffer.shape]
    dtypes = [jnp.float32, jnp.float32, jnp.float32, jnp.int32, buffer.dtype]
    call = compat.triton_call(
        partial(_kernel, entries=entries, block=block, blocks=blocks, temperature=temperature),
        grid=(rows * blocks,),
        in_specs=[_whole(x.shape) for x in inputs],
        out_specs=[_whole(shape) for shape in shapes],
        out_shape=[jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)],
        input_output_aliases={4: 3, 5: 4},
        num_warps=max(1, min(16, block // ENTRIES_A_WARP)),
        num_stages=1,
        interpret=interpret,
        name="linear_loss_gradient",
    )
    kl, log_sum, _, _, buffer = call(*inputs)
    return kl, log_sum, buffer


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _kernel(
    start_ref, kl_ref, ce_ref, labels_ref, _counts, _buffer, student_ref, *refs, entries, block, blocks, temperature
):
    *teacher_refs, loss_ref, log_sum_ref, statistics_ref, count_ref, out_ref = refs
    zero = jnp.minimum(pl.program_id(0), 0)
    ticket = pltriton.atomic_add(count_ref, (zero + kl_ref.shape[0],), zero + 1)
    row, place = ticket // blocks, ticket % blocks
    columns = place * block + jnp.arange(block)
    inside = columns < entries

    def read(ref):
        x = pltriton.load(ref.at[row, pl.ds(place * block, block)], mask=inside, other=-jnp.inf) * (1 / temperature)
        highest = jnp.max(x)
        exps = jnp.exp(x - highest)
        return x - highest, exps, highest, jnp.sum(exps)

    s, exp_s, max_s, sum_s = read(student_ref)
    mine = [max_s, sum_s]
    if teacher_refs:
        t, exp_t, max_t, sum_t = read(teacher_refs[0])
        mine += [max_t, sum_t, jnp.sum(jnp.where(inside, exp_t * (t - s), 0.0))]
    if blocks > 1:
        _publish(mine, statistics_ref, count_ref, row, place, blocks)
        merged = merge(*_gather(len(mine), statistics_ref, row, blocks))
    else:
        merged = merge(*(x[None] for x in mine))

    kl, ce, label = kl_ref[row], ce_ref[row], labels_ref[row]
    top_s, total_s, divergence = merged[0], merged[1], merged[-1]
    out = exp_s * ((kl + ce) * jnp.exp(max_s - top_s) / total_s) - jnp.where(columns == label, ce, 0.0)
    if teacher_refs:
        out -= jnp.where(kl != 0, exp_t * (kl * jnp.exp(max_t - merged[2]) / merged[3]), 0.0)
    out = jnp.where((kl != 0) | (ce != 0), out, 0.0).astype(out_ref.dtype)
    pltriton.store(out_ref.at[start_ref[0] + row, pl.ds(place * block, block)], out, mask=inside)
    loss_ref[row] = divergence
    log_sum_ref[row] = top_s + jnp.log(total_s)


def merge(max_s, sum_s, max_t=None, sum_t=None, cross=None):
    """The student's maximum and sum of exponentials, the teacher's, and their KL, out of those of blocks [J].

    `cross` is every block's sum of `exp(t - max_t) * ((t - max_t) - (s - max_s))`, around the block's maxima.
    """
    top_s = jnp.max(max_s)
    total_s = jnp.sum(sum_s * jnp.exp(max_s - top_s))
    if max_t is None:
        return top_s, total_s, top_s * 0
    top_t = jnp.max(max_t)
    shrink = jnp.exp(max_t - top_t)
    total_t = jnp.sum(sum_t * shrink)
    # A block that is not there has -inf for maxima and 0 for sums.
    shift = jnp.where(sum_t > 0, (max_t - top_t) - (max_s - top_s), 0.0)
    kl = jnp.sum(shrink * (cross + sum_t * shift)) / total_t + jnp.log(total_s) - jnp.log(total_t)
    return top_s, total_s, top_t, total_t, kl


def _publish(mine, statistics_ref, count_ref, row, place, blocks) -> None:
    """Write this block's statistics and wait until every block of the row has written its own."""
    for i, value in enumerate(mine):
        statistics_ref[row, i, place] = value
    # Atomics release what was written before them and acquire what others wrote before theirs.
    arrived = pltriton.atomic_add(count_ref, (row,), 1) + 1
    jax.lax.while_loop(lambda n: n < blocks, lambda n: pltriton.atomic_add(count_ref, (row,), 0), arrived)


def _gather(number: int, statistics_ref, row, blocks: int):
    width = statistics_ref.shape[-1]
    there = jnp.arange(width) < blocks
    for i in range(number):
        nothing = -jnp.inf if i in (0, 2) else 0.0
        yield pltriton.load(statistics_ref.at[row, i, pl.ds(0, width)], mask=there, other=nothing)


def _refuses(*, weight, tokens: Tokens, options: Options) -> str | None:
    if compat.platform() != "gpu":
        return f"it runs on a GPU and this is {compat.platform()}"
    return unsupported(weight=weight, tokens=tokens, options=options)


def unsupported(*, weight, tokens: Tokens, options: Options) -> str | None:
    """Why the kernel does not serve a call, on any platform."""
    for name, x in (("hidden", tokens.hidden), ("weight", weight)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}, and it accumulates in float32 from float32 or bfloat16 only"
    if options.top_k is not None or isinstance(tokens.teacher, TopK):
        return "it takes the teacher's whole distribution, not its top k"
    if options.vocab_axis is not None:
        return "it does not shard the vocabulary"
    if tokens.ce_share is not None and options.temperature != 1.0:
        return f"cross entropy is at temperature 1 and the divergence at {options.temperature}"
    return compat.undivided()


BACKEND = Backend("gpu", linear_loss, _refuses)
