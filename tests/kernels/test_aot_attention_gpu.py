"""Attention on a GPU compiles for an H100: at the lengths it is for, without spilling registers where speed counts."""

import aot
import pytest

SECONDS, TEMPORARIES = 60.0, 0.2 * 2**30


def _case(kind, slots, **arguments):
    name = " ".join([kind, str(slots), *(f"{k}={v}" for k, v in arguments.items())])
    first = "length" if kind == "sequence" else "slots"
    return aot.Case(name, "h100", f"attention_gpu_cases:{kind}", {first: slots} | arguments)


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")


def test_long_bfloat16_sequences_and_caches_without_spills():
    cases = [_case("sequence", 131_072), _case("cache", 524_288, batch=8), _case("cache", 4096, length=16, width=64)]
    results = aot.compile_all(cases)
    assert not aot.failures(results, SECONDS, TEMPORARIES)
    for result in results.values():
        assert {name: n for name, n in result.spilled.items() if n} == {}, result.name
    sequence, cache, _ = results.values()
    assert sequence.registers.keys() >= {"attention_forward", "attention_dq", "attention_dkv"}
    # Three programs of 128 threads a multiprocessor, as `gpu_decode.splits_for` counts on, may take 170 each.
    assert cache.registers["cached_attention"] <= 170


def test_documents_a_million_tokens_and_every_dtype():
    cases = [
        _case("sequence", 1_048_576, heads=4, kv_heads=2, segments=True),
        _case("sequence", 777, width=256, segments=True),
        _case("sequence", 777, width=96, dtype="float32", segments=True),
        _case("cache", 5001, length=4, width=128, dtype="float32"),
    ]
    assert not aot.failures(aot.compile_all(cases), SECONDS, TEMPORARIES)
