"""The numbers of one training stage, checked once."""

from __future__ import annotations

import dataclasses
import math

from hypenet_jax.errors import HypenetError

SCHEDULES = ("cosine", "constant", "warmup_stable")
WEIGHTS = ("float32", "bfloat16")

# Fields that may differ between a checkpoint and the run that resumes from it: they choose what is written, or how the
# same numbers are computed, not what the stage is.
FREE_FIELDS = ("log_every", "checkpoint_every", "keep", "token_chunk", "gradient_accumulation")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    steps: optimizer updates. batch_size: rows of one update over all devices and microbatches. seq_len: tokens a row.
    peak_lr, end_lr, warmup_steps, schedule: see `optim.learning_rate`; end_lr counts under "cosine" only.
    b1, b2, eps, weight_decay: AdamW. clip_norm: largest global norm of the gradient.
    log_every, checkpoint_every: in steps. keep: checkpoints kept.
    token_chunk: about how many tokens' logits the loss holds at a time; None chooses by the vocabulary.
    gradient_accumulation: microbatches one update is computed in.
    weights: what the trained weights and both moments are kept in. "bfloat16" is what the official code does, to
      compare with: an update below 1/512 of a weight rounds away.
    The defaults are HALO's (arXiv 2601.22156, stages 1 to 3).

    Raises:
      HypenetError: a field outside its range.
    """

    steps: int
    batch_size: int
    seq_len: int
    peak_lr: float
    end_lr: float
    warmup_steps: int = 50
    schedule: str = "cosine"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    log_every: int = 10
    checkpoint_every: int = 100
    keep: int = 2
    token_chunk: int | None = None
    gradient_accumulation: int = 1
    weights: str = "float32"

    def __post_init__(self):
        for name in ("steps", "batch_size", "seq_len", "log_every", "checkpoint_every", "keep"):
            self._check_integer(name, 1)
        self._check_integer("gradient_accumulation", 1)
        self._check_integer("warmup_steps", 0)
        if self.token_chunk is not None:
            self._check_integer("token_chunk", 1)
        for name in ("peak_lr", "eps", "clip_norm"):
            self._check_number(name, "above 0", lambda value: value > 0)
        for name in ("end_lr", "weight_decay"):
            self._check_number(name, "0 or above", lambda value: value >= 0)
        for name in ("b1", "b2"):
            self._check_number(name, "in [0, 1)", lambda value: 0 <= value < 1)
        if self.schedule not in SCHEDULES:
            raise HypenetError(f"schedule is {self.schedule!r}; use one of {', '.join(SCHEDULES)}")
        if self.weights not in WEIGHTS:
            raise HypenetError(f"weights is {self.weights!r}; use one of {', '.join(WEIGHTS)}")
        if self.schedule == "cosine" and self.warmup_steps >= self.steps:
            raise HypenetError(
                f"warmup_steps is {self.warmup_steps} but the stage has {self.steps} steps; the warm-up must be shorter"
            )
        if self.schedule == "cosine" and self.end_lr > self.peak_lr:
            raise HypenetError(f"end_lr is {self.end_lr:g}, above peak_lr {self.peak_lr:g}; lower it")
        if self.batch_size % self.gradient_accumulation:
            raise HypenetError(
                f"batch_size is {self.batch_size}, which gradient_accumulation {self.gradient_accumulation} does not "
                "divide; choose a divisor"
            )

    def _check_integer(self, name: str, lowest: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
            raise HypenetError(f"{name} is {value!r}; it must be an integer of at least {lowest}")

    def _check_number(self, name: str, wanted: str, holds) -> None:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or not holds(value):
            raise HypenetError(f"{name} is {value!r}; it must be a number {wanted}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len


def check_resumable(saved: dict, stage: StageConfig, directory: str) -> None:
    """Refuses to continue a checkpoint under numbers that would make the run another one.

    `saved` is the stage as `dataclasses.asdict` wrote it. More steps are allowed under a schedule that does not depend
    on their number ("constant", "warmup_stable").

    Raises:
      HypenetError: a field differs; the sentence names it and both values.
    """
    current = dataclasses.asdict(stage)
    # A field that is newer than the checkpoint had its default then.
    since = {f.name: f.default for f in dataclasses.fields(stage) if f.default is not dataclasses.MISSING}
    saved = since | saved
    extends = stage.schedule != "cosine" and stage.steps > saved.get("steps", 0)
    free = {*FREE_FIELDS, "steps"} if extends else set(FREE_FIELDS)
    for name, value in current.items():
        if name not in free and saved.get(name) != value:
            raise HypenetError(
                f"{name} is {value!r} but the checkpoints in {directory} were trained with {saved.get(name)!r}; "
                f"restore {name} or choose another directory"
            )
