"""The Lightning recurrence compiles for TPUs at long lengths: quickly, without temporaries, and to a tight schedule."""

import aot
import pytest

LIGHTNING = "lightning_cases:lightning"
SECONDS, TEMPORARIES = 5.0, 0.2 * 2**30


def _case(target, length, schedule=False, **arguments):
    name = " ".join([target, str(length), *(f"{k}={v}" for k, v in arguments.items())])
    return aot.Case(name, target, LIGHTNING, {"length": length, "backend": "tpu"} | arguments, schedule)


def test_compiles_for_tpu():
    cases = [_case(t, 131_072, backward=b) for t in ("v5e", "v5p", "v6e") for b in (False, True)]
    # Inputs, outputs and gradients are eight tensors and more: a v5e's 16 GiB hold eight heads of them, or four.
    cases += [_case("v5e", 524_288), _case("v5e", 524_288, heads=8, backward=True)]
    cases += [_case(t, 524_288, backward=b) for t in ("v5p", "v6e") for b in (False, True)]
    cases += [_case("v5e", 1_048_576, heads=4, backward=True), _case("v5p", 1_048_576, backward=True)]
    cases += [_case("v6e", 131_001, backward=True), _case("v5p", 524_288, segments=True, backward=True)]
    results = aot.compile_all(cases)
    slow = {name: r for name, r in results.items() if "segments" in name}
    plain = {name: r for name, r in results.items() if name not in slow}
    # Half of the time with segments is what XLA takes for the marks.
    assert not aot.failures(plain, SECONDS, TEMPORARIES) + aot.failures(slow, 2 * SECONDS, TEMPORARIES)


def test_a_layer_copies_nothing():
    """Inside a program XLA writes q, k and v in the order that the kernel reads."""
    length = 131_072
    cases = [aot.Case(t, t, "lightning_cases:layer", {"length": length}) for t in ("v5p", "v6e")]
    results, tensor = aot.compile_all(cases), length * 16 * 128 * 2
    assert not aot.failures(results, 4 * SECONDS, 4.02 * tensor)
    for result in results.values():
        # The input read and q, k, v written (6), the kernel (4), the output projection (2); a copy would add 2.
        assert result.bytes_accessed < 12.5 * tensor


def test_compiles_at_every_width_and_dtype():
    cases = [
        _case(target, length, width=width, dtype=dtype, segments=segments, backward=True)
        for target, length, width, dtype, segments in (
            ("v5e", 5000, 32, "bfloat16", False),
            ("v5p", 1, 64, "float32", True),
            ("v5e", 3000, 256, "float32", True),
            ("v6e", 777, 256, "bfloat16", False),
        )
    ]
    assert not aot.failures(aot.compile_all(cases), 20.0, TEMPORARIES)


@pytest.mark.parametrize(("segments", "limits"), [(False, (1.1, 1.1, 1.25)), (True, (1.65, 1.65, 1.65))])
def test_schedule_is_near_the_byte_bound(segments, limits):
    """Cycles a chunk on a v5p against the time its bytes take: 2.765 TB/s of HBM for two cores at 1.75 GHz."""
    results = aot.compile_all([_case("v5p", 131_072, schedule=True, segments=segments, backward=True)])
    (result,) = results.values()
    assert not result.error
    bytes_a_cycle = 2.765e12 / 2 / 1.75e9
    tensors = {"lightning_forward": 4, "lightning_dq": 4, "lightning_dkv": 6}
    for (kernel, moved), limit in zip(tensors.items(), limits, strict=True):
        # A grid step is two groups of eight chunks; what happens in its first or last step alone is counted in all.
        depth = result.bundles[kernel]
        cycles = (depth["1"] + 2 * depth["2"]) / 16
        ratio = cycles / (moved * 128 * 128 * 2 / bytes_a_cycle)
        assert ratio <= limit, f"{kernel}: {ratio:.3f}"
