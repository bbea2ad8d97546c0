"""Generation against a loop of full forward passes, alone and in batches, at once and as a stream."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hypenet_jax.errors import HypenetError
from hypenet_jax.inference import Sampling, generate, prompt_seed, sample, stream
from hypenet_jax.model import LanguageModel

NEW = 12
SAMPLED = {"temperature": 1.2, "top_k": 40, "top_p": 0.97}


def _prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 61, length).tolist()


def _naive(hybrid, prompt: list[int], new: int, seed: int = 0, **options) -> list[int]:
    """Every token by a full forward pass over the whole sequence, in one matrix so that it compiles once."""
    model, params = hybrid
    sequence = list(prompt)
    for index in range(new):
        tokens_BT = np.array([sequence + [0] * (64 - len(sequence))])
        logits_BV = model.logits(params, tokens_BT)[:, len(sequence) - 1]
        token = sample(logits_BV, np.array([prompt_seed(seed, 0)], np.uint32), index, Sampling(**options))
        sequence.append(int(token[0]))
    return sequence[len(prompt) :]


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_equals_a_loop_of_forward_passes(hybrid, options):
    prompt = _prompt(0, 21)
    expected = _naive(hybrid, prompt, NEW, seed=3, **options)
    assert generate(*hybrid, [prompt], NEW, stop_ids=[], seed=3, prefill_chunk=16, **options) == [expected]
    assert len(set(expected)) > 3


@settings(max_examples=8)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(0, 1000), st.booleans())
def test_unequal_batches_equal_every_prompt_alone(hybrid, lengths, seed, sampled):
    prompts = [_prompt(seed + index, length) for index, length in enumerate(lengths)]
    options = {"max_new_tokens": NEW, "prefill_chunk": 16} | (SAMPLED if sampled else {})
    together = generate(*hybrid, prompts, seed=seed, batch_size=4, **options)
    for index, prompt in enumerate(prompts):
        alone = generate(*hybrid, [prompt], seeds=[prompt_seed(seed, index)], **options)
        assert together[index] == alone[0]


def _fresh(model: LanguageModel, norm_eps: float) -> LanguageModel:
    """A model that no other test has compiled."""
    return LanguageModel(dataclasses.replace(model.config, norm_eps=norm_eps))


@pytest.fixture
def traced(monkeypatch) -> list[tuple[int, ...]]:
    """Token shapes that the model was compiled for: its Python runs at tracing alone."""
    shapes, step = [], LanguageModel.step

    def recorded(self, params, tokens_BT, *rest):
        shapes.append(tokens_BT.shape)
        return step(self, params, tokens_BT, *rest)

    monkeypatch.setattr(LanguageModel, "step", recorded)
    return shapes


def test_fixed_shapes_compute_full_batches_and_chunks(hybrid, traced):
    """Of one shape, any company gives the same bits, and so the same tokens."""
    model, params = _fresh(hybrid[0], 3e-6), hybrid[1]
    prompts = [_prompt(seed, length) for seed, length in enumerate([3, 90, 41, 70, 5])]
    options = {"max_new_tokens": 40, "temperature": 4.0, "stop_ids": [], "prefill_chunk": 64, "fixed_shapes": True}
    together = generate(model, params, prompts, seeds=range(5), batch_size=4, **options)
    for index, prompt in enumerate(prompts):
        assert generate(model, params, [prompt], seeds=[index], batch_size=4, **options) == [together[index]]
    assert set(traced) == {(4, 64), (4, 1)}


def test_prompts_of_similar_length_share_compilations(hybrid, traced):
    model, params = _fresh(hybrid[0], 2e-6), hybrid[1]
    options = {"stop_ids": [], "batch_size": 2, "prefill_chunk": 16}
    generate(model, params, [_prompt(0, 90), _prompt(1, 70)], 9, **options)
    before = len(traced)
    assert set(traced) == {(2, 16), (2, 1)}
    generate(model, params, [_prompt(2, 33), _prompt(3, 50), _prompt(4, 17), _prompt(5, 61)], 40, **options)
    assert len(traced) == before


def test_order_of_prompts_is_kept(hybrid):
    prompts = [_prompt(seed, length) for seed, length in enumerate([3, 30, 1, 17, 8])]
    results = generate(*hybrid, prompts, NEW, stop_ids=[], batch_size=4, prefill_chunk=16)
    backwards = generate(*hybrid, prompts[::-1], NEW, stop_ids=[], batch_size=4, prefill_chunk=16)
    assert results == backwards[::-1] and len({tuple(result) for result in results}) == 5


def test_stop_tokens_end_a_row_and_are_left_out(hybrid):
    prompts = [_prompt(seed, 10 + seed) for seed in range(4)]
    free = generate(*hybrid, prompts, 40, stop_ids=[], prefill_chunk=16)
    assert all(len(tokens) == 40 for tokens in free)
    stops = [free[0][4], free[1][35]]
    expected = [list(itertools.takewhile(lambda token: token not in stops, tokens)) for tokens in free]
    assert generate(*hybrid, prompts, 40, stop_ids=stops, prefill_chunk=16) == expected
    assert len(expected[0]) <= 4 and len(expected[1]) <= 35
    # A stop token as the very first token leaves nothing.
    assert generate(*hybrid, prompts[:1], 40, stop_ids=[free[0][0]], prefill_chunk=16) == [[]]


def test_the_models_eos_stops_by_default(hybrid):
    model, params = hybrid
    prompt = _prompt(0, 10)
    free = generate(model, params, [prompt], NEW, stop_ids=[], prefill_chunk=16)[0]
    ending = LanguageModel(dataclasses.replace(model.config, eos_ids=(free[5],)))
    assert generate(ending, params, [prompt], NEW, prefill_chunk=16)[0] == free[: free.index(free[5])]


@pytest.mark.parametrize("new", [1, 2, 33, 70])
def test_lengths_across_bursts(hybrid, new):
    longest = generate(*hybrid, [_prompt(1, 9)], 70, stop_ids=[], prefill_chunk=16)[0]
    result = generate(*hybrid, [_prompt(1, 9)], new, stop_ids=[], prefill_chunk=16)[0]
    assert result == longest[:new] and len(result) == new


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_stream_equals_generate(hybrid, options):
    prompt, options = _prompt(2, 19), {"max_new_tokens": 45, "prefill_chunk": 16, "seed": 5} | options
    expected = generate(*hybrid, [prompt], stop_ids=[], **options)[0]
    assert list(stream(*hybrid, prompt, stop_ids=[], **options)) == expected
    stop = expected[20]
    assert list(stream(*hybrid, prompt, stop_ids=[stop], **options)) == expected[: expected.index(stop)]


def test_a_stream_comes_before_the_end(hybrid):
    """Three tokens of a long stream need the first bursts alone."""
    taken = list(itertools.islice(stream(*hybrid, _prompt(3, 5), 200, stop_ids=[], prefill_chunk=16), 3))
    assert taken == generate(*hybrid, [_prompt(3, 5)], 3, stop_ids=[], prefill_chunk=16)[0]


def test_seeds_differ_between_prompts_and_repeat_between_calls(hybrid):
    prompts, options = [_prompt(4, 12)] * 3, {"stop_ids": [], "prefill_chunk": 16} | SAMPLED
    first = generate(*hybrid, prompts, NEW, seed=1, **options)
    assert first == generate(*hybrid, prompts, NEW, seed=1, **options)
    assert first != generate(*hybrid, prompts, NEW, seed=2, **options)
    assert len({tuple(tokens) for tokens in first}) == 3
    same = generate(*hybrid, prompts, NEW, seeds=[9, 9, 9], **options)
    assert same[0] == same[1] == same[2]


def test_bfloat16_model_generates_from_float32_parameters(hybrid):
    model, params = hybrid
    rough = LanguageModel(model.config, "bfloat16")
    tokens = generate(rough, params, [_prompt(5, 9)], 4, stop_ids=[])[0]
    assert len(tokens) == 4 and all(0 <= token < 61 for token in tokens)


def test_no_prompts_give_no_results(hybrid):
    assert generate(*hybrid, []) == []


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "prompt 0 is empty"),
        ([3, 61], {}, "prompt 0 has token id 61; the vocabulary of the model is 0 to 60"),
        ([-1], {}, "prompt 0 has token id -1"),
        ([[1, 2]], {}, r"prompt 0 is an array of int64 with shape \(1, 2\)"),
        ([1.5], {}, "prompt 0 is an array of float64"),
        ([1] * 10, {"max_new_tokens": 7, "max_len": 16}, "has 10 tokens, which with 7 new ones exceed max_len 16"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"prefill_chunk": 0}, "prefill_chunk is 0"),
        ([1], {"temperature": -1.0}, "temperature is -1.0"),
        ([1], {"top_k": 0}, "top_k is 0"),
        ([1], {"top_p": 1.5}, "top_p is 1.5"),
        ([1], {"stop_ids": [61]}, "stop_ids has token id 61"),
        ([1], {"seed": -1}, "seed is -1"),
    ],
)
@pytest.mark.parametrize("function", ["generate", "stream"])
def test_errors(hybrid, prompt, options, message, function):
    with pytest.raises(HypenetError, match=message) as error:
        generate(*hybrid, [prompt], **options) if function == "generate" else stream(*hybrid, prompt, **options)
    assert "\n" not in str(error.value) and not str(error.value).endswith(".")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seeds": [1, 2]}, "seeds has 2 entries but there are 1 prompts"),
        ({"seeds": [2**32]}, "seeds contains 4294967296"),
    ],
)
def test_errors_of_batches(hybrid, options, message):
    with pytest.raises(HypenetError, match=message):
        generate(*hybrid, [[1]], **options)
