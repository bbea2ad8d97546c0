"""What is left out of a segment's state: by going through the tokens, and in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_contract import segments

from kernels_pallas.lightning import pieces
from kernels_pallas.lightning.gpu_kernels import Layout
from kernels_pallas.lightning.marks import Decay, marks

CHUNK = 4
RATES = np.asarray([0.0, 0.01, 0.3, 2.0, 40.0], np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def both_ways(layout, length, bits, rates):
    """In closed form, and from the marks of one document; one program compiles sooner than all its operations."""
    marked = marks(Decay(rates, None), CHUNK, length, None)
    return pieces.of_rates(layout, CHUNK, rates, bits), pieces.of_marks(layout, marked, bits)


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.integers(1, 30),
    parts=st.integers(1, 6),
    per_segment=st.integers(1, 4),
    reverse=st.booleans(),
    bits=st.sampled_from([150.0, 24.3, 5.1]),
)
def test_closed_form_and_sums_leave_out_the_same(chunks, parts, per_segment, reverse, bits):
    whole = -(-chunks // (parts * per_segment)) * per_segment
    layout = Layout(reverse, chunks * CHUNK, -(-chunks // whole), whole, per_segment, exact=False, interpret=True)
    got, wanted = both_ways(layout, chunks * CHUNK, bits, RATES)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape == (1, len(RATES), layout.steps)
    np.testing.assert_array_equal(got[0], wanted[0])
    np.testing.assert_array_equal(got[1], wanted[1])
    # The exponents reach 40 * 4 * 30 = 4800, of which the sums round each term.
    np.testing.assert_allclose(got[2], wanted[2], rtol=3e-4, atol=1e-37)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
def test_what_a_segments_end_has_forgotten_is_left_out(segmented, reverse):
    """By going through the tokens: two segments of 8 chunks of 16 tokens, in four pieces; 240 of 256 tokens."""
    length, chunk, rates = 240, 16, np.array([0.01, 3.0], np.float32)
    ids = segments((1, length), runs=0.01) if segmented else np.zeros((1, length), np.int32)
    layout = Layout(reverse, length, 2, 8, 4, False, True)
    marked = marks(Decay(rates, None), chunk, length, jnp.asarray(ids))
    skip, live, keep = (np.asarray(x)[0] for x in pieces.of_marks(layout, marked, 150.0))

    real = [t for t in range(length) if ids[0, t] >= 0]
    for head, rate in enumerate(rates):
        for step in range(4):  # pieces of two chunks, of the segment that is scanned first
            piece, edge = 7 - step if reverse else step, 128
            lasting = 0
            for c in range(2):
                first = 32 * piece + 16 * c
                if first >= length:
                    continue
                beyond = [t for t in real if (edge <= t < first if reverse else first + 16 <= t < edge)]
                inside = [t for t in real if first <= t < first + 16]
                near = (inside[:1] if reverse else inside[-1:]) or beyond
                one = len({ids[0, t] for t in (*beyond, *near)}) <= 1
                lasting += one and rate * len(beyond) <= 150 * np.log(2)
            assert skip[head, step] == sum(32 * piece + 16 * c < length for c in range(2)) - lasting, (head, step)
            assert live[head, step] == (lasting > 0)
    assert skip[1].any() and live.any() and keep.shape == (2, 4)
