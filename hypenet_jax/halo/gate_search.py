"""The joint gate search: which layers' attention the whole network needs, all layers decided at once."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hypenet_jax.halo import corpus, select
from hypenet_jax.halo.align import mixers_of
from hypenet_jax.halo.gate_batches import GateBatches, packed_retrieval
from hypenet_jax.halo.gates import gate_loss, gate_stage
from hypenet_jax.halo.run import Run, student_model
from hypenet_jax.halo.settings import GateSearchConfig
from hypenet_jax.halo.workdir import DATA
from hypenet_jax.model import LanguageModel
from hypenet_jax.model.serialize import config_to_dict
from hypenet_jax.parallel.processes import on_host
from hypenet_jax.parallel.rules import param_shardings, rules_of
from hypenet_jax.train.loop import train
from hypenet_jax.train.stage import StageConfig
from hypenet_jax.train.step import abstract_state, make_step

DIRECTORY = "gate-search"


@dataclasses.dataclass(frozen=True)
class GateSearch:
    """What every search of a run shares, its compiled step above all. mixers: {"layer_i": ..} after stage 1."""

    run: Run
    mixers: dict

    @property
    def settings(self) -> GateSearchConfig:
        return self.run.config.select.gate

    @property
    def student(self) -> LanguageModel:
        """The model of Lightning layers alone."""
        return student_model(self.run, ())

    @functools.cached_property
    def stage(self) -> StageConfig:
        """The search as a stage of training; its learning rate is the mixers'."""
        return gate_stage(self.settings, self.run.config.distill.token_chunk)

    @functools.cached_property
    def loss(self) -> Callable:
        """See `gates.gate_loss`."""
        teacher = self.run.teacher
        keep = select.kept(teacher.config.num_layers, self.run.config.select.keep)
        return gate_loss(teacher, self.student, self.settings, keep, self.stage.token_chunk)

    @functools.cached_property
    def update(self) -> Callable:
        """The training step, compiled at its first call and shared by all seeds."""
        params, shardings = self._params()
        abstract = abstract_state(params, self.stage, shardings, self.run.mesh)
        return make_step(self.loss, self.stage, abstract, self.run.mesh)

    @functools.cached_property
    def frozen(self) -> dict:
        """The teacher, and the mixers unless they are trained, in the compute dtype."""
        beside = {} if self.settings.trains == "mixers" else self.mixers
        mixers = jax.tree.map(lambda leaf: leaf.astype(self.run.config.dtype), beside)
        return {"teacher": self.run.frozen, "mixers": mixers}

    def search(self, seed: int, directory: pathlib.Path) -> dict[str, Any]:
        """{"gate": [L] learned scalars, "open": [L] gates, "tokens", "seconds"}; trains in `directory`, resumably.

        `seed` orders the batches. Nothing is learned where no layer or every layer is kept.
        """
        run, settings, num_layers = self.run, self.settings, self.run.teacher.config.num_layers
        retrieval = packed_retrieval(settings, run.tokenizer, run.workdir / DATA / DIRECTORY)
        stages = (run.config.align, run.config.distill, run.config.finetune)
        # Beyond the text of all stages: what they read is the same whatever the method.
        start = sum(corpus.stage_tokens(stage) for stage in stages)
        batches = GateBatches(retrieval, run.text, settings, start, seed, run.mesh, run.config.data.workers)
        params, shardings = self._params()
        trained, summary = train(
            name=f"gate search, seed {seed}",
            loss_fn=self.loss,
            params=params,
            frozen=self.frozen,
            batches=batches,
            stage=self.stage,
            directory=directory,
            mesh=run.mesh,
            param_shardings=shardings,
            model_info=config_to_dict(self.student.config) | {"gate": dataclasses.asdict(settings), "seed": seed},
            reporter=run.reporter,
            update=self.update,
        )
        scalars = on_host(trained["scalars"]).astype(float) * (settings.gate_lr / settings.mixer_lr)
        return {
            "gate": scalars.tolist(),
            "open": [summary[f"gate_{layer}"] for layer in range(num_layers)],
            "tokens": settings.steps * self.stage.tokens_per_step,
            "seconds": summary["seconds"],
        }

    def _params(self) -> tuple[dict, Any]:
        """What is trained, and its shardings."""
        num_layers, run = self.run.teacher.config.num_layers, self.run
        params: dict = {"scalars": jnp.zeros(num_layers, jnp.float32)}
        axes: dict = {"scalars": ("norm",)}
        if self.settings.trains == "mixers":
            params["mixers"], axes["mixers"] = self.mixers, mixers_of(self.student.param_axes(), num_layers)
            return params, param_shardings(axes, params, run.mesh, rules_of(run.config.rules))
        return params, param_shardings(axes, params, run.mesh)
