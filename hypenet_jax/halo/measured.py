"""eval.json: models asked the same, every answer kept as soon as it is there, so that a stopped evaluation goes on."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hypenet_jax.data.tokenizers import Tokenizer
from hypenet_jax.evals import suite
from hypenet_jax.halo.settings import EvaluateConfig
from hypenet_jax.halo.workdir import read_json, timed, write_json
from hypenet_jax.model import LanguageModel
from hypenet_jax.train.preemption import EXIT_PREEMPTED, Preemption

EVALUATION = "eval.json"


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model to measure; about: what eval.json holds of it beside the scores, and what tells it from another."""

    model: LanguageModel
    params: dict
    about: dict[str, str] = dataclasses.field(default_factory=dict)

    def is_of(self, kept: dict | None) -> bool:
        """Whether what eval.json holds was measured of this model."""
        return kept is not None and all(kept.get(key) == value for key, value in self.about.items())


@dataclasses.dataclass(frozen=True)
class Questions:
    """What every model is asked. windows: int32 [N, T+1]; essays: what S2 and S3 hide their needles in."""

    settings: EvaluateConfig
    seed: int
    tokenizer: Tokenizer
    windows: np.ndarray
    essays: str | Sequence[str]


class Evaluation:
    """eval.json of a work directory. `found`: what it holds of these questions; with others it begins anew.

    lengths: rows of the training in tokens, by name; a part of what the file has to agree with.
    """

    def __init__(self, workdir: pathlib.Path, asked: Questions, say: Callable[[str], None], **lengths: int):
        self._workdir, self._asked, self._say = workdir, asked, say
        # What is asked for every a has a file of its own. The run's own seed is no setting: files may be older than it.
        own = {"seed"} if asked.settings.seed is None else set()
        settings = dataclasses.asdict(asked.settings)
        settings = {k: v for k, v in settings.items() if not k.startswith("scale_") and k not in own}
        wanted = {"settings": settings, **lengths}
        path = workdir / EVALUATION
        found = read_json(path) if path.is_file() else {}
        if {name: found.get(name) for name in wanted} != json.loads(json.dumps(wanted)):
            found = wanted | {"models": {}, "samples": []}
        self._begun: dict[str, Any] = found.pop("begun", {})
        self.found: dict[str, Any] = found

    def measure(self, name: str, one: Measured, step: str, *, samples: bool = True) -> None:
        """Put the scores of one model, and with `samples` its writing, into the file, unless they are there.

        step: as messages and run.json name it. After SIGTERM all processes end together with EXIT_PREEMPTED once the
        result at hand is kept.
        """
        found, asked, settings = self.found, self._asked, self._asked.settings
        if one.is_of(found["models"].get(name)):
            return
        found["samples"] = [sample for sample in found["samples"] if sample["model"] != name]
        with timed(self._workdir, step), Preemption() as preemption:

            def keep(measured: dict) -> None:
                write_json(self._workdir / EVALUATION, found | {"begun": {name: one.about | measured}})
                if preemption.requested():
                    self._say(f"{step}: stopped and saved; the same command continues")
                    raise SystemExit(EXIT_PREEMPTED)

            begun = self._begun.get(name)
            found["models"][name] = one.about | suite.evaluate_model(
                one.model,
                one.params,
                asked.tokenizer,
                settings,
                windows=asked.windows,
                essays=asked.essays,
                seed=asked.seed,
                report=lambda line: self._say(f"{step}  {line}"),
                begun=begun if one.is_of(begun) else None,
                keep=keep,
            )
            if samples:
                found["samples"] += suite.write_samples(
                    name, one.model, one.params, asked.tokenizer, settings.prompts, settings.new_tokens,
                    chat=settings.chat,
                )  # fmt: skip
        write_json(self._workdir / EVALUATION, found)
