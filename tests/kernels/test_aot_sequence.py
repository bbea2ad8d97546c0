"""Ring, gather and state passing compile for a TPU slice, with the kernels and with memory that the shards share."""

from aot import Case, compile_all, failures

LENGTH = 65536
SOFTMAX, LINEAR = "sequence_aot_cases:softmax", "sequence_aot_cases:linear"
ROWS = 8 * LENGTH * 128 * 4 // 4  # bytes of one float32 array of all heads on one of four chips


def test_mixing_over_four_chips_compiles():
    shape = {"topology": "v5p", "length": LENGTH}
    cases = [
        Case("ring", "v5p", SOFTMAX, shape | {"exchange": "ring"}),
        Case("gather", "v5p", SOFTMAX, shape | {"exchange": "gather"}),
        Case("lightning", "v5p", LINEAR, shape),
    ]
    # Of the ring, float32 sums and partial results: o and dq twice, dk and dv likewise with half of the heads, and
    # half as many copies. The gather has the whole sequence's keys, values and gradients instead.
    assert not failures(compile_all(cases), seconds=60, temp_bytes=13 * ROWS)
