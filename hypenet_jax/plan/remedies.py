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
from hypenet_jax.train.stage import StageConfig

# Each candidate is a compilation.
MOST_TRIED = 5
Config = ConvertConfig | PretrainConfig


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change in the words of `--set`, complete: given to a run of the config it makes what was compiled."""

    change: str
    config: Config
    axes: dict[str, int]


def candidates(stage: str, config: Config, axes: dict[str, int]) -> Iterator[Remedy]:
    """Changes that lower a stage's memory per device, the cheapest first.

    `remat` costs a second forward pass, gradient accumulation nothing but smaller products, a mesh that divides the
    parameters further more traffic, and `seq` divides what is left of activations: one long row.
    """
    changes: list[str] = []
    if stage not in INFERENCE:
        if not config.remat and stage != "align":
            config, changes = dataclasses.replace(config, remat=True), ["remat=True"]
            yield _remedy(changes, config, axes, axes)
        for accumulation in _accumulations(getattr(config, stage), axes):
            settings = dataclasses.replace(getattr(config, stage), gradient_accumulation=accumulation)
            changed = dataclasses.replace(config, **{stage: settings})
            yield _remedy([*changes, f"{stage}.gradient_accumulation={accumulation}"], changed, axes, axes)
    for moved in _meshes(axes):
        yield _remedy(changes, config, axes, moved)
    if stage in INFERENCE:
        return
    for seq in (2, 4, 8, 16, 32):
        if axes.get("fsdp", 1) % seq == 0:
            moved = axes | {"fsdp": axes["fsdp"] // seq, "seq": axes.get("seq", 1) * seq}
            yield _remedy(changes, config, axes, moved)


def _remedy(changes: list[str], config: Config, axes: dict[str, int], moved: dict[str, int]) -> Remedy:
    """The mesh is named with every axis that a run would otherwise take from the config."""
    sizes = {name: 1 for name in config.mesh} | moved
    named = [f"mesh.{name}={size}" for name, size in sizes.items() if size != 1 or config.mesh.get(name, 1) != 1]
    return Remedy(" --set ".join([*changes, *(named if moved != axes else [])]), config, moved)


def _accumulations(settings: StageConfig, axes: dict[str, int]) -> list[int]:
    """Twice as many microbatches as there are, and as many as the rows can be divided into."""
    rows = math.prod(axes.get(name, 1) for name in ("dcn", "data", "fsdp"))
    now = settings.gradient_accumulation
    possible = [n for n in range(now + 1, settings.batch_size + 1) if settings.batch_size % (n * rows) == 0]
    return sorted({min(possible, key=lambda n: abs(n - 2 * now)), max(possible)}) if possible else []


def _meshes(axes: dict[str, int]) -> Iterator[dict[str, int]]:
    """Replicas given up for parameters divided further; then heads and vocabulary divided."""
    if axes.get("data", 1) > 1:
        yield axes | {"data": 1, "fsdp": axes.get("fsdp", 1) * axes["data"]}
    for tensor in (2, 4):
        if axes.get("fsdp", 1) % tensor == 0:
            yield axes | {"fsdp": axes["fsdp"] // tensor, "tensor": axes.get("tensor", 1) * tensor}


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
            # A mesh or batch that does not divide is no remedy, nor are arguments that alone are too large.
            continue
        tried.append(candidate.change)
        if not compiled.short:
            room = ", with little room: plan it with --full" if compiled.tight else ""
            return f"--set {candidate.change} fits ({compiled.total / 2**30:.1f} GiB; compiled){room}"
        say(f"{candidate.change} is still short by {compiled.short / 2**30:.2f} GiB")
    if not tried:
        return "nothing that we know of divides it further: take more or larger chips"
    return f"of {', '.join(tried)} none suffices (each compiled): take more or larger chips"
