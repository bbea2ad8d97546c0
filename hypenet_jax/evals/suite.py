"""One model's measurements: perplexity by position, needles by length and depth, and samples of its writing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hypenet_jax.data.chat import encode_prompt
from hypenet_jax.evals import niah, perplexity
from hypenet_jax.evals.niah_samples import NiahSample, make_samples
from hypenet_jax.evals.packed import packed_windows, score_packed
from hypenet_jax.evals.token_nll import bind
from hypenet_jax.inference import generate
from hypenet_jax.model import LanguageModel

if TYPE_CHECKING:
    from hypenet_jax.data.tokenizers import Tokenizer
    from hypenet_jax.halo.settings import EvaluateConfig


def evaluate_model(
    model: LanguageModel,
    params: dict,
    tokenizer: Tokenizer,
    config: EvaluateConfig,
    *,
    windows: np.ndarray,
    essays: str | Sequence[str],
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
    begun: dict | None = None,
    keep: Callable[[dict], None] = lambda measured: None,
) -> dict:
    """{"perplexity", "perplexity_by_position", "niah"} as eval.json holds them for one model.

    windows: int32 [N, T+1] held-out documents. essays: what S2 and S3 hide their needles in. `report` is told each
    result in a line. `keep` is given all that is measured so far after each result, JSON-able; as `begun` it makes
    another call go on from there.
    """
    measured = {"niah": [], "cells": [], **(begun or {})}
    if "perplexity" not in measured:
        losses = _window_loss(model, params, config, windows)
        report(f"perplexity {losses.perplexity:.3f} over {len(windows)} windows of {windows.shape[1] - 1} tokens")
        measured |= {"perplexity": losses.perplexity, "perplexity_by_position": losses.by_position()}
        keep(measured)
    for task in config.tasks:
        for length in config.lengths:
            if [task, length] in measured["cells"]:
                continue
            found = needles(model, params, tokenizer, config, task, length, essays, seed)
            right, total = sum(row["correct"] for row in found), sum(row["total"] for row in found)
            report(f"NIAH {found[0]['task']} at {length}: {right} of {total}")
            measured["niah"] += found
            measured["cells"].append([task, length])
            keep(measured)
    return {name: measured[name] for name in ("perplexity", "perplexity_by_position", "niah")}


def _window_loss(model: LanguageModel, params: dict, config: EvaluateConfig, windows: np.ndarray):
    if config.row_tokens is not None:
        rows = packed_windows(windows, config.row_tokens)
        return perplexity.window_loss(model, params, rows, 1)
    batch = max(1, config.batch_tokens // (windows.shape[1] - 1))
    return perplexity.window_loss(model, params, windows, batch)


def needles(
    model: LanguageModel,
    params: dict,
    tokenizer: Tokenizer,
    config: EvaluateConfig,
    task: str,
    length: int,
    essays: str | Sequence[str],
    seed: int,
) -> list[dict]:
    """Rows {"task", "length", "depth", "correct", "total"} of one task at one length."""
    samples = needle_samples(tokenizer, config, task, length, essays, seed)
    batch = max(1, min(config.samples, config.batch_tokens // length))
    if config.answer == "generate":
        return niah.score(model, params, tokenizer, samples, None, config.answer_budget, batch_size=batch).rows
    if config.row_tokens is not None:
        return score_packed(bind(model, params), samples, config.row_tokens, alternatives=config.alternatives).rows
    chunk = config.prefill_chunk if length > config.prefill_chunk else None
    return niah.score_forced(model, params, samples, batch, prefill_chunk=chunk, alternatives=config.alternatives).rows


def needle_samples(
    tokenizer: Tokenizer, config: EvaluateConfig, task: str, length: int, essays: str | Sequence[str], seed: int
) -> list[NiahSample]:
    """The samples of one task at one length; raises HypenetError where they cannot be made."""
    return make_samples(
        task,
        tokenizer,
        length,
        config.samples,
        config.depths,
        seed,
        essays,
        answer_budget=config.answer_budget,
        first_ids=() if tokenizer.bos_id is None else (tokenizer.bos_id,),
    )


def prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    """Ids of each prompt as it is, or with `chat` as a user's turn with the assistant's opened."""
    return [encode_prompt(tokenizer, prompt) if chat else tokenizer.encode(prompt) for prompt in prompts]


def write_samples(
    name: str,
    model: LanguageModel,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    new_tokens: int,
    *,
    chat: bool = False,
) -> list[dict]:
    """[{"model", "prompt", "text"}]: greedy continuations of the prompts, or with `chat` answers to them.

    Raises HypenetError where `chat` is asked of a tokenizer without a chat template.
    """
    if not prompts:
        return []
    ids = prompt_ids(tokenizer, prompts, chat)
    continued = generate(model, params, ids, new_tokens)
    return [
        {"model": name, "prompt": prompt, "text": tokenizer.decode(new)}
        for prompt, new in zip(prompts, continued, strict=True)
    ]
