"""The recurrence on a GPU: a pass that makes states, then one that makes outputs; backward one for each gradient.

Bytes, in units u of one [B,T,H,D] tensor: forward 2u + 4u, backward 2u + 12u; the passes of 2u fall away where one
segment a row fills the chip. No temporary is larger than the segments' states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.compat import compute_capability, multiprocessors, platform, undivided
from kernels_pallas.dispatch import Backend
from kernels_pallas.lightning import gpu_kernels
from kernels_pallas.lightning.gpu_kernels import Layout, Tiles
from kernels_pallas.lightning.marks import Decay, Marks, marks
from kernels_pallas.lightning.pieces import of_marks, of_rates
from kernels_pallas.lightning.recurrence import Options, Passes, backend_function

WIDTHS = (16, 32, 64, 128, 256)
MIN_CHUNKS = 4  # a segment: fewer would spend more on states than on tokens
# Pieces a segment, of at least so many chunks. Heads that forget fast leave most of a segment out: cut finely, the
# rest is shared among more multiprocessors.
MAX_PIECES, PIECE_CHUNKS = 8, 32
MAX_STEPS = 32  # pieces a row, where the segments are not more: `joined_states` is unrolled
# Bits of decay after which a token is nothing to a float32 state: below the smallest number, undecayed it was about 1.
FLOAT32_BITS = 150.0


class Plan(NamedTuple):
    """The tiles of the kernels, which must agree on the tokens a chunk: the marks are made for one."""

    states: Tiles
    scan: Tiles


def plan(options: Options, width: int, key_width: int, dtype) -> Plan:
    """Tiles by head width, dtype and machine. Measured on an H100 in bfloat16 (docs/decisions/0016)."""
    exact = options.high or dtype == jnp.float32
    roomy = compute_capability()[0] in (9, 10)  # over 200 KB of shared memory: Hopper, and Blackwell's large chips
    # K and V change places in the gradients' scans: what holds for one must hold for the other.
    narrow, wide = min(width, key_width), max(width, key_width) > 128
    columns = min(narrow, 64 if exact or (wide and not roomy) else 128)
    tiles = Tiles(32 if exact or wide or not roomy else 64, columns, 4 if narrow <= 64 else 8, 2)
    if exact and wide:
        # What fits in shared memory.
        tiles = tiles._replace(chunk=16) if roomy else tiles._replace(chunk=16, columns=min(narrow, 32), stages=1)
    if exact or not roomy:
        return Plan(tiles, tiles)
    return Plan(tiles._replace(stages=4), tiles._replace(stages=3))


class Kernels(NamedTuple):
    """The functions of gpu_kernels.py, or others that do the same."""

    local_states: Callable[..., jax.Array]
    joined_states: Callable[..., jax.Array]
    scan: Callable[..., Any]


PALLAS = Kernels(gpu_kernels.local_states, gpu_kernels.joined_states, gpu_kernels.scan)


def forward(
    options: Options,
    q,
    k,
    v,
    decay: Decay,
    initial_state,
    segment_ids,
    tiles: Plan | None = None,
    kernels: Kernels = PALLAS,
):
    """See `recurrence.Passes`; what is saved are the states before the segments."""
    tiles = tiles or plan(options, v.shape[-1], k.shape[-1], q.dtype)
    layout = _layout(options, tiles, q, v)
    rates, marked = _rates(decay, tiles.scan.chunk, q.shape[1], segment_ids, q.shape[2])
    starts = _starts(kernels, layout, tiles.states, rates, marked, k, v, initial_state, options.short_memory)
    scales = layout._replace(out_scale=options.scale, scores_scale=options.scale)
    o, state = kernels.scan(scales, tiles.scan, rates, marked, q, k, v, starts, v.dtype)
    return o, state, starts


def backward(
    options: Options,
    q,
    k,
    v,
    decay: Decay,
    initial_state,
    segment_ids,
    saved,
    do,
    dstate,
    tiles: Plan | None = None,
    kernels: Kernels = PALLAS,
):
    """See `recurrence.Passes`."""
    del initial_state
    tiles = tiles or plan(options, v.shape[-1], k.shape[-1], q.dtype)
    wide = [jnp.float32, jnp.float32, v.dtype] if options.wide else [q.dtype, k.dtype, v.dtype]
    layout = _layout(options, tiles, q, v)
    rates, marked = _rates(decay, tiles.scan.chunk, q.shape[1], segment_ids, q.shape[2])
    ahead = layout._replace(out_scale=options.scale, scores_scale=options.scale)
    dq, _ = kernels.scan(ahead, tiles.scan, rates, marked, do, v, k, jnp.swapaxes(saved, -1, -2), wide[0])
    back = layout._replace(reverse=True, in_scale=options.scale, scores_scale=options.scale)
    dstate = dstate.astype(jnp.float32)
    starts = _starts(kernels, back, tiles.states, rates, marked, q, do, dstate, options.short_memory)
    starts = starts[:, ::-1]  # in the order of the row
    dv, dinitial = kernels.scan(back, tiles.scan, rates, marked, k, q, do, starts, wide[2])
    dk, _ = kernels.scan(back, tiles.scan, rates, marked, v, do, q, jnp.swapaxes(starts, -1, -2), wide[1])
    return dq, dk, dv, dinitial


def _layout(options: Options, tiles: Plan, q, v) -> Layout:
    batch, length, heads, _ = q.shape
    chunks = -(-length // tiles.scan.chunk)
    programs = batch * heads * (v.shape[-1] // tiles.scan.columns)
    # One program on each multiprocessor fills the chip; narrow ones wait for each other less if they are two.
    room = multiprocessors() * (2 if v.shape[-1] <= 32 else 1)
    segments = max(1, min(room // programs, chunks // MIN_CHUNKS))
    pieces = max(1, min(MAX_PIECES, chunks // (segments * PIECE_CHUNKS), MAX_STEPS // segments))
    per_segment = -(-chunks // (segments * pieces)) * pieces
    exact = options.high or q.dtype == jnp.float32
    return Layout(False, length, -(-chunks // per_segment), per_segment, pieces, exact, options.interpret)


def _rates(decay: Decay, chunk: int, length: int, segment_ids, heads: int) -> tuple[jax.Array, Marks | tuple[()]]:
    """The heads' rates, and the marks where tokens differ: documents, decays of their own, a last chunk not full."""
    if segment_ids is None and decay.slopes_H is not None and length % chunk == 0:
        return decay.slopes_H, ()
    return jnp.zeros(heads, jnp.float32), marks(decay, chunk, length, segment_ids)


def _starts(
    kernels: Kernels, layout: Layout, tiles: Tiles, rates, marked, k, v, first_state, short_memory
) -> jax.Array:
    """The state that each segment starts from, in the order of the scan."""
    if layout.segments == 1:
        return first_state[:, None]
    batch, _, heads, _ = k.shape
    bits = FLOAT32_BITS if short_memory is None else short_memory
    pieces = of_marks(layout, marked, bits) if marked else of_rates(layout, tiles.chunk, rates, bits)
    skip, live, keep = (jnp.broadcast_to(x.swapaxes(1, 2), (batch, layout.steps, heads)) for x in pieces)
    local = kernels.local_states(layout, tiles, rates, skip, marked, k, v)
    return kernels.joined_states(layout, local, live, keep, first_state)


def refuses(*, q_BTHK, k_BTHK, v_BTHV) -> str | None:
    """See `dispatch.Backend`."""
    if platform() != "gpu":
        return f"it runs on a GPU and this is {platform()}"
    for name, x in (("q", q_BTHK), ("k", k_BTHK), ("v", v_BTHV)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} is {x.dtype}, and it takes float32 and bfloat16"
        if x.shape[-1] not in WIDTHS:
            return f"{name} has width {x.shape[-1]}, and it takes {', '.join(map(str, WIDTHS))}"
    if not q_BTHK.dtype == k_BTHK.dtype == v_BTHV.dtype:
        return f"q, k, v are {q_BTHK.dtype}, {k_BTHK.dtype}, {v_BTHV.dtype}, and it takes one dtype"
    return undivided()


BACKEND = Backend("gpu", backend_function(Passes(forward, backward)), refuses)
