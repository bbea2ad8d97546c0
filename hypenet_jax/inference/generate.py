"""Token ids in, new token ids out: many prompts at once, or one prompt as a stream."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hypenet_jax.errors import HypenetError
from hypenet_jax.inference.batching import as_prompts, batches, cache_size, check_token_ids, pad_right, padded_rows
from hypenet_jax.inference.decode import BURST, decode
from hypenet_jax.inference.prefill import prefill
from hypenet_jax.inference.sampling import Sampling, prompt_seed
from hypenet_jax.model import LanguageModel


def generate(
    model: LanguageModel,
    params: dict,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    prefill_chunk: int = 512,
    max_len: int | None = None,
    seeds: Sequence[int] | None = None,
    fixed_shapes: bool = False,
) -> list[list[int]]:
    """The new tokens of every prompt, in the order of the prompts.

    A row ends at the first of `stop_ids` (default: the model's eos ids; an empty list: never), which is not part of
    the result, or after max_new_tokens. temperature, top_k, top_p: see `Sampling`. Every prompt draws from its own
    seed: `seeds` (one a prompt, 0 .. 2^32 - 1), or by default prompt_seed(seed, index).
    max_len fixes the slots of the cache (default: what each batch needs, rounded up, so that few shapes are compiled).

    What a prompt yields does not depend on its neighbours, up to rounding: an incomplete batch has fewer rows and a
    short prompt a narrower chunk, whose logits may differ in the last bits, which decides between tokens that all but
    tie. fixed_shapes=True always computes batch_size rows and whole chunks: slower for few or short prompts, but
    every prompt then gives the same tokens in any company (bit for bit on a CPU).

    Raises HypenetError for an empty prompt, an id outside the vocabulary, a prompt that with max_new_tokens exceeds
    max_len, and settings out of range.
    """
    stops = _stop_ids(model, stop_ids)
    sampling = Sampling(temperature, top_k, top_p)
    request = _Request(sampling, stops, max_new_tokens, prefill_chunk, max_len, narrow_last=not fixed_shapes)
    arrays = as_prompts(prompts, model.config.vocab_size)
    _check_lengths(arrays, max_new_tokens, max_len)
    if batch_size < 1:
        raise HypenetError(f"batch_size is {batch_size}; it must be at least 1")
    prompt_seeds = _prompt_seeds(len(arrays), seed, seeds)
    params = serving_parameters(model, params)
    results: list[list[int]] = [[] for _ in arrays]
    for indices in batches([len(prompt) for prompt in arrays], batch_size):
        rows = batch_size if fixed_shapes else padded_rows(len(indices), batch_size)
        seeds_B = np.zeros(rows, np.uint32)
        seeds_B[: len(indices)] = prompt_seeds[indices]
        batch = [arrays[index] for index in indices]
        for tokens_BN in _run(model, params, batch, seeds_B, request, itertools.repeat(BURST)):
            for index, tokens_N in zip(indices, tokens_BN, strict=False):
                results[index].extend(tokens_N[tokens_N >= 0].tolist())
    return results


def stream(
    model: LanguageModel,
    params: dict,
    prompt: Sequence[int],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_ids: Sequence[int] | None = None,
    seed: int = 0,
    prefill_chunk: int = 512,
    max_len: int | None = None,
) -> Iterator[int]:
    """The tokens of `generate(model, params, [prompt], ...)[0]` as they come: bursts of 1, 1, 2, 4, then 8.

    Errors as `generate`, raised by the call itself and not by the first `next`.
    """
    stops = _stop_ids(model, stop_ids)
    request = _Request(Sampling(temperature, top_k, top_p), stops, max_new_tokens, prefill_chunk, max_len)
    arrays = as_prompts([prompt], model.config.vocab_size)
    _check_lengths(arrays, max_new_tokens, max_len)
    seeds_B = _prompt_seeds(1, seed, None)
    bursts = itertools.chain((1, 2, 4), itertools.repeat(8))
    steps = _run(model, serving_parameters(model, params), arrays, seeds_B, request, bursts)
    return (token for tokens_BN in steps for token in tokens_BN[0].tolist() if token >= 0)


def serving_parameters(model: LanguageModel, params: dict) -> dict:
    """Parameters with the matrices in the compute dtype, so that decoding does not read and round them every token.

    Every matrix is rounded to the compute dtype before use anyway; vectors keep their dtype. Arrays of the right dtype
    are not copied; numpy arrays move to the device once.
    """
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, model.dtype if leaf.ndim > 1 else leaf.dtype), params)


@dataclasses.dataclass(frozen=True)
class _Request:
    sampling: Sampling
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    prefill_chunk: int
    max_len: int | None
    narrow_last: bool = True

    def __post_init__(self):
        for name in ("max_new_tokens", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise HypenetError(f"{name} is {getattr(self, name)}; it must be at least 1")


def _run(
    model: LanguageModel,
    params: dict,
    prompts: Sequence[np.ndarray],
    seeds_B: np.ndarray,
    request: _Request,
    bursts: Iterable[int],
) -> Iterator[np.ndarray]:
    tokens_BT, valid_BT = pad_right(prompts, len(seeds_B))
    slots = request.max_len or cache_size(tokens_BT.shape[1] + request.max_new_tokens)
    cache, logits_BV = prefill(
        model,
        params,
        tokens_BT,
        valid_BT,
        max_len=slots,
        chunk=request.prefill_chunk,
        narrow_last=request.narrow_last,
    )
    yield from decode(
        model,
        params,
        cache,
        logits_BV,
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
        stop_ids=request.stop_ids,
        seeds_B=seeds_B,
        bursts=bursts,
    )


def _stop_ids(model: LanguageModel, stop_ids: Sequence[int] | None) -> tuple[int, ...]:
    if stop_ids is None:
        return tuple(model.config.eos_ids)
    check_token_ids(np.asarray(stop_ids, np.int64), model.config.vocab_size, "stop_ids")
    return tuple(int(token) for token in stop_ids)


def _check_lengths(prompts: Sequence[np.ndarray], max_new_tokens: int, max_len: int | None) -> None:
    for index, prompt in enumerate(prompts):
        if max_len is not None and len(prompt) + max_new_tokens > max_len:
            raise HypenetError(
                f"prompt {index} has {len(prompt)} tokens, which with {max_new_tokens} new ones exceed max_len "
                f"{max_len}; raise max_len or shorten either"
            )


def _prompt_seeds(count: int, seed: int, seeds: Sequence[int] | None) -> np.ndarray:
    if seeds is None:
        if seed < 0:
            raise HypenetError(f"seed is {seed}; it must be at least 0")
        seeds = [prompt_seed(seed, index) for index in range(count)]
    if len(seeds) != count:
        raise HypenetError(f"seeds has {len(seeds)} entries but there are {count} prompts; give one a prompt")
    outside = [value for value in seeds if not 0 <= value < 2**32]
    if outside:
        raise HypenetError(f"seeds contains {outside[0]}; a seed is a whole number from 0 to 2^32 - 1")
    return np.asarray(seeds, np.uint32)
