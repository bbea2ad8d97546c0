"""Whether the a that fits the loss serves retrieval too: the same needles, asked for a grid of a."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from hypenet_jax.data.tokenizers import Tokenizer
from hypenet_jax.evals import niah, suite
from hypenet_jax.halo.settings import EvaluateConfig
from hypenet_jax.halo.workdir import read_json, write_json
from hypenet_jax.model import LanguageModel

# ln(t + a) / ln(a) is exactly 1 in float32 at any position: unscaled, in the program that serves the whole grid.
UNSCALED = 1e30


def scale_needles(
    path: pathlib.Path,
    student: LanguageModel,
    params: dict,
    tokenizer: Tokenizer,
    settings: EvaluateConfig,
    *,
    grid: Sequence[float],
    essays: str | Sequence[str],
    seed: int,
    report: Callable[[str], None] = lambda line: None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """{"settings", "rows": [{"a" (None: unscaled), "task", "length", "correct", "total"}]}, written row by row to path.

    Every task of `settings` at every one of its `scale_lengths` is asked for each a of the grid, for the a that the
    student carries, and unscaled; answers are read off one forward ("forced", whatever `settings.answer` says). Rows
    that the file holds from the same settings are kept. `between` is called after each row is kept.
    """
    scaling = student.config.logits_scaling
    values = sorted({float(a) for a in grid} | ({scaling.value} if scaling else set()))
    named = ("tasks", "samples", "depths", "essays", "answer_budget", "alternatives")
    asked = {name: value for name, value in dataclasses.asdict(settings).items() if name in named}
    wanted = json.loads(json.dumps(asked | {"seed": seed, "fitted": scaling.value if scaling else None}))
    found = read_json(path) if path.is_file() else {}
    if found.get("settings") != wanted:
        found = {"settings": wanted, "rows": []}
    done = {(row["a"], row["asked"], row["length"]) for row in found["rows"]}
    plain = student.with_logits_scaling(None)
    for task in settings.tasks:
        for length in settings.scale_lengths:
            wanted_here: tuple[float | None, ...] = (None, *values)
            missing = [a for a in wanted_here if (a, task, length) not in done]
            if not missing:
                continue
            samples = suite.needle_samples(tokenizer, settings, task, length, essays, seed)
            batch = max(1, min(settings.samples, settings.batch_tokens // length))
            chunk = settings.prefill_chunk if length > settings.prefill_chunk else None
            for a in missing:
                scored = niah.score_forced(
                    plain,
                    params,
                    samples,
                    batch,
                    prefill_chunk=chunk,
                    alternatives=settings.alternatives,
                    hype_a=UNSCALED if a is None else a,
                )
                row = {"a": a, "asked": task, "task": samples[0].task, "length": length}
                row |= {"correct": sum(scored.correct), "total": len(samples)}
                found["rows"].append(row)
                write_json(path, found)
                words = "unscaled" if a is None else f"a = {a:.4g}"
                report(f"evaluate needles  {row['task']} at {length}, {words}: {row['correct']} of {row['total']}")
                between()
    return found
