"""What to change when a step does not fit: candidates in order of what they cost, the first that holds by compiling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.settings import ConvertConfig, PretrainConfig
from hypenet_jax.plan.compile import Compiled
from hypenet_jax.plan.stages import INFERENCE

# Each candidate is a compilation.
MOST_TRIED = 4
Config = ConvertConfig | PretrainConfig


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change in the words of `--set`, and the config and mesh with it."""

    change: str
    config: Config
    axes: dict[str, int]


def candidates(stage: str, config: Config, axes: dict[str, int]) -> Iterator[Remedy]:
    """Changes that lower a stage's memory per device, the cheapest first.

    `remat` costs a second forward pass, gradient accumulation nothing but smaller products, a mesh that divides the
    parameters further more traffic, and `seq` divides what is left of activations: one long row.
    """
    if stage in INFERENCE:
        yield from _meshes(config, axes)
        return
    if not config.remat and stage != "align":
        config = dataclasses.replace(config, remat=True)
        yield Remedy("remat=True", config, axes)
    settings = getattr(config, stage)
    rows = math.prod(axes.get(name, 1) for name in ("dcn", "data", "fsdp"))
    accumulation = settings.gradient_accumulation * 2
    while settings.batch_size % accumulation == 0 and (settings.batch_size // accumulation) % rows == 0:
        changed = dataclasses.replace(settings, gradient_accumulation=accumulation)
        yield Remedy(
            f"{stage}.gradient_accumulation={accumulation}", dataclasses.replace(config, **{stage: changed}), axes
        )
        accumulation *= 2
    yield from _meshes(config, axes)
    for seq in (2, 4, 8, 16, 32):
        if axes.get("fsdp", 1) % seq == 0:
            moved = axes | {"fsdp": axes["fsdp"] // seq, "seq": axes.get("seq", 1) * seq}
            yield Remedy(f"mesh.fsdp={moved['fsdp']} --set mesh.seq={moved['seq']}", config, moved)


def _meshes(config: Config, axes: dict[str, int]) -> Iterator[Remedy]:
    """Replicas given up for parameters divided further; then heads and vocabulary divided."""
    if axes.get("data", 1) > 1:
        moved = axes | {"data": 1, "fsdp": axes.get("fsdp", 1) * axes["data"]}
        yield Remedy(f"mesh.data=1 --set mesh.fsdp={moved['fsdp']}", config, moved)
    for tensor in (2, 4):
        if axes.get("fsdp", 1) % tensor == 0:
            moved = axes | {"fsdp": axes["fsdp"] // tensor, "tensor": axes.get("tensor", 1) * tensor}
            yield Remedy(f"mesh.fsdp={moved['fsdp']} --set mesh.tensor={moved['tensor']}", config, moved)


def remedy(
    stage: str,
    config: Config,
    axes: dict[str, int],
    compile_with: Callable[[Config, dict[str, int]], Compiled],
    say: Callable[[str], Any],
) -> str:
    """A sentence on what to change: a change that was compiled and fits, or that none of those tried does."""
    tried: list[str] = []
    for candidate in candidates(stage, config, axes):
        if len(tried) == MOST_TRIED:
            break
        try:
            compiled = compile_with(candidate.config, candidate.axes)
        except HypenetError:
            # A mesh or batch that does not divide is no remedy.
            continue
        tried.append(candidate.change)
        if not compiled.short:
            return f"--set {candidate.change} fits ({compiled.total / 2**30:.1f} GiB; compiled)"
        say(f"{candidate.change} is still short by {compiled.short / 2**30:.2f} GiB")
    if not tried:
        return "nothing that we know of divides it further: take more or larger chips"
    return f"of {', '.join(tried)} none suffices (each compiled): take more or larger chips"
