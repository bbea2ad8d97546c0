"""Scores of needle samples: by generation, as RULER does, or by one teacher-forced forward, much cheaper.

Samples are made in `niah_samples.py`; their names are importable from here too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.niah_samples import ANSWER_BUDGET, NiahSample, TextTokenizer, make_samples
from hypenet_jax.parallel.activations import mesh_of
from hypenet_jax.parallel.processes import on_host

__all__ = ["ANSWER_BUDGET", "NiahSample", "NiahScore", "make_samples", "score", "score_forced"]

GenerateFn = Callable[..., Sequence[Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class NiahScore:
    """correct[i]: whether sample i was answered. rows: what eval.json's "niah" lists. texts: generations, if any."""

    correct: tuple[bool, ...]
    rows: list[dict]
    texts: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        """The share of right answers, in [0, 1]."""
        return sum(self.correct) / len(self.correct)


def score(
    model: Any,
    params: Any,
    tokenizer: TextTokenizer,
    samples: Sequence[NiahSample],
    generate_fn: GenerateFn | None = None,
    max_new_tokens: int = ANSWER_BUDGET,
    *,
    batch_size: int = 8,
) -> NiahScore:
    """RULER's string_match_all on greedy generations: the answer occurs in the text, case ignored.

    generate_fn(model, params, prompts, max_new_tokens, temperature=0.0) -> new token ids of each prompt;
    `hypenet_jax.inference.generate` when None. Samples of one length go in batches of batch_size prompts, the last
    batch filled up with copies, so that shapes repeat.
    """
    if generate_fn is None:
        from hypenet_jax.inference import generate  # needed only where no other generation is given

        generate_fn = functools.partial(generate, batch_size=batch_size)
    texts = [""] * len(samples)
    for indices in _batches(samples, batch_size):
        prompts = [list(samples[i].prompt_ids) for i in indices]
        prompts += [list(prompts[-1]) for _ in range(batch_size - len(indices))]
        generated = generate_fn(model, params, prompts, max_new_tokens, temperature=0.0)
        for i, ids in zip(indices, generated, strict=False):
            texts[i] = tokenizer.decode(list(ids))
    pairs = zip(samples, texts, strict=True)
    correct = tuple(sample.answer_text.lower() in text.lower() for sample, text in pairs)
    return NiahScore(correct, score_rows(samples, correct), tuple(texts))


def score_forced(
    model: Any,
    params: Any,
    samples: Sequence[NiahSample],
    batch_size: int = 8,
    *,
    prefill_chunk: int | None = None,
    alternatives: bool = True,
    row_length: int | None = None,
    hype_a: float | None = None,
) -> NiahScore:
    """Whether greedy generation would begin with the answer, by one teacher-forced forward and no generation.

    A sample is right when every answer token is the argmax given the prompt and the answer tokens before it, which is
    exactly "greedy generation begins with the answer". With `alternatives`, samples that miss " <value>" are tried
    again with ": <value>", so the result is a lower bound of `score` (an answer later in the text is not seen) at a
    fraction of its cost: two forwards at most, logits at the answer positions only.

    Rows are right-padded to their samples' `length` with segment id -1, the last batch with empty rows: one
    compilation per (model, length, batch_size). prefill_chunk None runs `model.hidden` on whole rows; a number runs
    `model.step` over chunks of that many tokens with a cache, for lengths whose activations would not fit. row_length:
    all rows are of that length, so that samples of several lengths share one compilation. `hype_a` scales the queries
    by s_t of that a instead of the model's own scaling; it is traced, so that a grid of them shares the compilation.
    """
    how = (batch_size, prefill_chunk, row_length, None if hype_a is None else np.float32(hype_a))
    correct = _forced_pass(model, params, samples, [s.answer_ids for s in samples], *how)
    missed = [i for i, right in enumerate(correct) if not right and samples[i].alternative_ids]
    if alternatives and missed:
        again = [samples[i] for i in missed]
        answers = [sample.alternative_ids for sample in again]
        for i, right in zip(missed, _forced_pass(model, params, again, answers, *how), strict=True):
            correct[i] = right
    return NiahScore(tuple(correct), score_rows(samples, correct))


def _forced_pass(
    model: Any,
    params: Any,
    samples: Sequence[NiahSample],
    answers: Sequence[Sequence[int]],
    batch_size: int,
    prefill_chunk: int | None,
    row_length: int | None,
    hype_a: np.float32 | None,
) -> list[bool]:
    correct = [False] * len(samples)
    width = -(-max((len(a) for s in samples for a in (s.answer_ids, s.alternative_ids)), default=1) // 8) * 8
    for indices in _batches(samples, batch_size, row_length):
        length = row_length or samples[indices[0]].length
        tokens_BT = np.zeros((batch_size, length), np.int32)
        segments_BT = np.full((batch_size, length), -1, np.int32)
        targets_BA = np.full((batch_size, width), -1, np.int32)
        positions_BA = np.zeros((batch_size, width), np.int32)
        for row, i in enumerate(indices):
            prompt, answer = samples[i].prompt_ids, list(answers[i])
            ids = [*prompt, *answer[:-1]]
            if len(ids) > length:
                raise HypenetError(f"prompt and answer have {len(ids)} tokens but the length is {length}; raise it")
            tokens_BT[row, : len(ids)] = ids
            segments_BT[row, : len(ids)] = 0
            targets_BA[row, : len(answer)] = answer
            positions_BA[row, : len(answer)] = len(prompt) - 1 + np.arange(len(answer))
        with mesh_of(params):
            right_B = _answers_are_argmax(
                model, params, tokens_BT, segments_BT, positions_BA, targets_BA, prefill_chunk, hype_a
            )
        for i, right in zip(indices, on_host(right_B), strict=False):
            correct[i] = bool(right)
    return correct


@functools.partial(jax.jit, static_argnames=("model", "prefill_chunk"))
def _answers_are_argmax(model, params, tokens_BT, segments_BT, positions_BA, targets_BA, prefill_chunk, hype_a=None):
    """bool [B]: the argmax at positions_BA is targets_BA wherever a target is given (>= 0)."""
    scaled = {} if hype_a is None else {"hype_a": hype_a}
    if prefill_chunk is None:
        hidden_BTD = model.hidden(params, tokens_BT, segments_BT, **scaled)
        hidden_BAD = jnp.take_along_axis(hidden_BTD, positions_BA[..., None], axis=1)
    else:
        hidden_BAD = _chunked_hidden(model, params, tokens_BT, segments_BT >= 0, positions_BA, prefill_chunk, scaled)
    head = model.head(params).astype(hidden_BAD.dtype)
    logits_BAV = jnp.einsum("bad,dv->bav", hidden_BAD, head, preferred_element_type=jnp.float32)
    return jnp.all((jnp.argmax(logits_BAV, axis=-1) == targets_BA) | (targets_BA < 0), axis=-1)


def _chunked_hidden(model, params, tokens_BT, valid_BT, positions_BA, chunk, scaled):
    """Hidden states at positions_BA, from a prefill in chunks that keeps no others."""
    batch, length = tokens_BT.shape
    chunks = -(-length // chunk)
    padding = ((0, 0), (0, chunks * chunk - length))

    def split(x_BT):
        return jnp.pad(x_BT, padding).reshape(batch, chunks, chunk).swapaxes(0, 1)

    def body(carry, inputs):
        cache, found_BAD = carry
        start, tokens_BC, valid_BC = inputs
        hidden_BCD, cache = model.step(params, tokens_BC, cache, valid_BC, **scaled)
        offsets_BA = positions_BA - start
        picked_BAD = jnp.take_along_axis(hidden_BCD, jnp.clip(offsets_BA, 0, chunk - 1)[..., None], axis=1)
        inside_BA = (offsets_BA >= 0) & (offsets_BA < chunk)
        return (cache, jnp.where(inside_BA[..., None], picked_BAD, found_BAD)), None

    inputs = (jnp.arange(chunks) * chunk, split(tokens_BT), split(valid_BT))
    cache = model.init_cache(batch, chunks * chunk)
    spec = jax.eval_shape(lambda c: model.step(params, inputs[1][0], c, inputs[2][0])[0], cache)
    found_BAD = jnp.zeros((*positions_BA.shape, spec.shape[-1]), spec.dtype)
    (_, found_BAD), _ = jax.lax.scan(body, (cache, found_BAD), inputs)
    return found_BAD


def _batches(samples: Sequence[NiahSample], batch_size: int, row_length: int | None = None) -> Iterator[list[int]]:
    """Indices of at most batch_size samples of one length, or of any where all rows are of `row_length`."""
    if batch_size < 1:
        raise HypenetError(f"batch_size is {batch_size}; give at least 1")
    if not samples:
        raise HypenetError("there are no samples to score; make at least 1")
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        by_length[row_length or sample.length].append(i)
    for length in sorted(by_length):
        indices = by_length[length]
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


def score_rows(samples: Sequence[NiahSample], correct: Sequence[bool]) -> list[dict]:
    """The rows of eval.json's "niah": right answers by task, length and depth."""
    counts: dict[tuple[str, int, float], list[int]] = defaultdict(lambda: [0, 0])
    for sample, right in zip(samples, correct, strict=True):
        cell = counts[sample.task, sample.length, round(sample.depth, 1)]
        cell[0] += bool(right)
        cell[1] += 1
    return [
        {"task": task, "length": length, "depth": depth, "correct": right, "total": total}
        for (task, length, depth), (right, total) in sorted(counts.items())
    ]
