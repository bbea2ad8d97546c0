"""The settings of a comparison of architectures that are trained from scratch with everything else the same."""

from __future__ import annotations

import dataclasses
import math

from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.settings import (
    DataConfig,
    EvaluateConfig,
    FitScaleConfig,
    NetworkConfig,
    check_choice,
    check_positive,
)
from hypenet_jax.model.config import POSITIONS
from hypenet_jax.train.stage import StageConfig

SCALINGS = ("none", "fit", "constant")


@dataclasses.dataclass(frozen=True)
class VariantConfig:
    """One line of the comparison. Variants that differ in their scaling alone share one training.

    name: of directories and lines. hybrid: False puts attention into every layer. position: see `model.config`.
    scaling: of the attention queries, after training (HALO trains without): "none"; "fit", s_t = ln(t+a)/ln(a) with a
    fitted by the loss on long held-out documents; "constant", the factor `constant` everywhere.
    intermediate_size: where mixers hold fewer parameters, the width of the MLPs that makes up for it.
    """

    name: str
    hybrid: bool = True
    position: str = "hype"
    scaling: str = "none"
    constant: float = 1.5
    intermediate_size: int | None = None

    def __post_init__(self):
        check_choice("variants.position", self.position, POSITIONS)
        check_choice("variants.scaling", self.scaling, SCALINGS)
        usable = self.name.isprintable() and self.name == self.name.strip(". ") and "/" not in self.name
        if not self.name or not usable:
            raise HypenetError(f"variants.name is {self.name!r}; it must be usable as the name of a directory")
        if not self.hybrid and self.position != "rope":
            raise HypenetError(
                f"variant {self.name!r} is no hybrid but its position is {self.position!r}; only hybrids have variants"
            )
        if not 0 < self.constant < math.inf:
            raise HypenetError(
                f"variant {self.name!r} has the constant {self.constant:g}; it must be above 0 and finite"
            )
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise HypenetError(
                f"variant {self.name!r} has the intermediate_size {self.intermediate_size}; it must be at least 1"
            )


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
    """Architectures from scratch: the same text in the same order, the same steps, then needles and loss by length."""

    variants: tuple[VariantConfig, ...]
    model: NetworkConfig  # the hybrids' sizes and attention layers
    data: DataConfig
    train: StageConfig
    tokenizer: str = "bytes"  # "bytes", or a directory or file with a tokenizer.json
    fit_scale: FitScaleConfig = FitScaleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    # Needles stand in rows of these lengths, each in the shortest that holds it: fewer programs to compile. A length
    # above all of them has rows of its own.
    row_lengths: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
    dtype: str = "bfloat16"
    remat: bool = False
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) < len(names):
            raise HypenetError(f"variants are named {names}; give at least one, and each a name of its own")
        few = not self.seeds or len(set(self.seeds)) < len(self.seeds)
        if few or not 0 <= min(self.seeds) <= max(self.seeds) < 2**32:
            raise HypenetError(f"seeds are {list(self.seeds)}; give at least one, each once, from 0 and below 2**32")
        if min(self.row_lengths, default=1) < 1:
            raise HypenetError(f"row_lengths are {list(self.row_lengths)}; each must be at least 1")
        if self.evaluate.answer != "forced":
            raise HypenetError(f"evaluate.answer is {self.evaluate.answer!r}; a comparison scores 'forced'")
        if self.model.attention_layers is None:
            raise HypenetError("model.attention_layers is not given; the hybrids need them")
        for name in ("position", "logits_scaling"):
            if getattr(self.model, name) != NetworkConfig.__dataclass_fields__[name].default:
                raise HypenetError(f"model.{name} is {getattr(self.model, name)!r}; set it in the variants instead")
        for name in ("tasks", "lengths"):
            if not getattr(self.evaluate, name):
                raise HypenetError(f"evaluate.{name} is empty; a comparison needs at least one")
        check_positive("evaluate", self.evaluate, "samples")
