"""What `hypenet ablate` can ask: the open questions of the recipe, each as variants that differ in one thing."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.settings import AblateConfig, ConvertConfig, ObjectiveConfig
from hypenet_jax.train.stage import StageConfig

# The learning rates of the paper: stage 2 of its 2B model, and stage 3 (arXiv 2601.22156).
STAGE_2, STAGE_3 = (1e-4, 1e-5), (1e-5, 1e-5)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One recipe. Fields at their defaults are the config's own, or this project's.

    against: the variant it is compared with; None is the study's first. align_share: of a cell's updates; None takes
    `ablate.align_steps`. rates: (peak_lr, end_lr) of stage 2; equal ones are held from the warm-up on.
    """

    name: str
    label: str
    against: str | None = None
    start: str = "calibrated"
    align_share: float | None = None
    objective: ObjectiveConfig = ObjectiveConfig()
    weights: str = "float32"
    rates: tuple[float, float] | None = None
    documents: str = "masked"


@dataclasses.dataclass(frozen=True)
class Study:
    """Variants that share everything but what is asked. aligns: whether a cell begins with its own alignment."""

    name: str
    question: str
    variants: tuple[Variant, ...]
    aligns: bool = False

    @property
    def objective_fields(self) -> tuple[str, ...]:
        """What the variants set in the objective: traced, so that they share a program; the others are not computed."""
        plain = ObjectiveConfig()
        return tuple(
            field.name
            for field in dataclasses.fields(ObjectiveConfig)
            if any(getattr(v.objective, field.name) != getattr(plain, field.name) for v in self.variants)
        )

    def against(self, variant: Variant) -> Variant | None:
        """What the variant is compared with; None for one that others are compared with."""
        if variant.against is not None:
            return next(v for v in self.variants if v.name == variant.against)
        return None if variant is self.variants[0] or self._is_reference(variant) else self.variants[0]

    def _is_reference(self, variant: Variant) -> bool:
        return any(v.against == variant.name for v in self.variants)


def _masters() -> tuple[Variant, ...]:
    rates = (
        ("config", "the config's rates", None),
        ("stage2", "1e-4 to 1e-5", STAGE_2),
        ("stage3", "1e-5 held", STAGE_3),
    )
    found = []
    for name, words, values in rates:
        found += [
            Variant(f"float32-{name}", f"float32 weights, {words}", rates=values),
            Variant(f"bfloat16-{name}", f"bfloat16 weights, {words}", f"float32-{name}",
                    weights="bfloat16", rates=values),
        ]  # fmt: skip
    return tuple(found)


_ALL = (
    Study(
        "start",
        "How many tokens does the calibrated start save, and what of it: the gates or the output norms?",
        (
            Variant("calibrated", "calibrated"),
            Variant("official", "official (random)", start="official"),
            Variant("random-gates", "calibrated, but random gates", start="random-gates"),
            Variant("unit-norms", "calibrated, but unit output norms", start="unit-norms"),
        ),
        aligns=True,
    ),
    Study(
        "masters",
        "What does stage 2 lose with weights and moments kept in bfloat16, at the paper's learning rates?",
        _masters(),
    ),
    Study(
        "kl",
        "Which loss for stage 2: the exact KL, the official code's twelfth of it, cross-entropy, hidden states?",
        (
            Variant("exact", "exact KL"),
            Variant("one-twelfth", "one row in twelve (official bug)", objective=ObjectiveConfig(kl_one_in=12)),
            Variant("half-ce", "half KL, half CE", objective=ObjectiveConfig(ce_weight=0.5)),
            Variant("ce", "CE alone", objective=ObjectiveConfig(ce_weight=1.0)),
            Variant("hidden", "KL + hidden states", objective=ObjectiveConfig(hidden_weight=1.0)),
        ),
    ),
    Study(
        "lengths",
        "How much of a fixed number of tokens should alignment have before distillation begins?",
        (
            Variant("eighth", "1/8 alignment", align_share=1 / 8),
            Variant("none", "no alignment", align_share=0.0),
            Variant("quarter", "1/4 alignment", align_share=1 / 4),
            Variant("half", "1/2 alignment", align_share=1 / 2),
        ),
        aligns=True,
    ),
    Study(
        "documents",
        "Does it matter in stage 2 whether a row's documents see each other?",
        (
            Variant("masked", "masked (ours)"),
            Variant("joined", "joined (official)", documents="joined"),
        ),
    ),
)
STUDIES = {study.name: study for study in _ALL}


def steps_of(study: Study, variant: Variant, settings: AblateConfig) -> tuple[int, int]:
    """(updates of alignment, updates of distillation) of a cell; 0 where a stage is left out."""
    if not study.aligns:
        return 0, settings.distill_steps
    if variant.align_share is None:
        return settings.align_steps, settings.distill_steps
    total = settings.align_steps + settings.distill_steps
    align = round(variant.align_share * total)
    return align, total - align


def stage_of(config: ConvertConfig, name: str, steps: int, variant: Variant) -> StageConfig:
    """The numbers of a cell's stage: the config's, over `steps` updates, with what the variant changes."""
    settings, stage = config.ablate, getattr(config, name)
    changes: dict[str, Any] = {
        "steps": steps,
        "batch_size": settings.batch_size or config.distill.batch_size,
        "seq_len": settings.seq_len or config.distill.seq_len,
        "warmup_steps": min(stage.warmup_steps, steps // 5),
    }
    if name == "distill":
        changes["weights"] = variant.weights
        if settings.peak_lr is not None:
            changes |= {"peak_lr": settings.peak_lr, "end_lr": stage.end_lr * settings.peak_lr / stage.peak_lr}
        if variant.rates is not None:
            peak, end = variant.rates
            changes |= {"peak_lr": peak, "end_lr": end, "schedule": "cosine" if end < peak else "warmup_stable"}
    return dataclasses.replace(stage, **changes)


def check(study: Study, config: ConvertConfig) -> None:
    """Raise HypenetError where the config's cells cannot hold the study's variants."""
    batch = config.ablate.batch_size or config.distill.batch_size
    for variant in study.variants:
        if variant.objective.kl_one_in > batch:
            raise HypenetError(
                f"study {study.name!r} takes one row in {variant.objective.kl_one_in} but a batch has {batch}; set "
                f"ablate.batch_size to {variant.objective.kl_one_in} or more"
            )
        for name, steps in zip(("align", "distill"), steps_of(study, variant, config.ablate), strict=True):
            if steps:
                stage_of(config, name, steps, variant)
