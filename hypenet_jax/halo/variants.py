"""The variants that layer selection compares: the teacher with any set of layers replaced by stage-1 students."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hypenet_jax.evals.choice import Choices, choice
from hypenet_jax.evals.recall import RecallRows, recall
from hypenet_jax.evals.token_nll import project_nll
from hypenet_jax.model import LanguageModel, mixers, stack
from hypenet_jax.parallel.activations import mesh_of
from hypenet_jax.parallel.sharded_kernels import linear_kl


def variant_hidden(teacher: LanguageModel, student: LanguageModel) -> Callable:
    """hidden(params, mixer_params, replaced_L, tokens_BT, segment_ids_BT) -> [B, T, D].

    replaced_L (bool [L]) is traced: one compiled program serves all variants, and a layer runs only the mixer that
    its flag names. Inference only.
    """

    def hidden(params, mixer_params, replaced_L, tokens_BT, segment_ids_BT):
        def mix(layer, normed_BTD, context):
            own = params[f"layer_{layer}"]["mixer"]
            new = mixer_params[f"layer_{layer}"]
            return jax.lax.cond(
                replaced_L[layer],
                lambda x: mixers.lightning.forward(new, student.config, x, context),
                lambda x: mixers.attention.forward(own, teacher.config, x, context),
                normed_BTD,
            )

        return stack.forward(
            params,
            teacher.config,
            tokens_BT,
            segment_ids_BT,
            dtype=jnp.dtype(teacher.dtype),
            mix=mix,
            exchange=teacher.exchange,
        )

    return hidden


def measure(
    teacher: LanguageModel,
    params: dict,
    student: LanguageModel,
    mixer_params: dict,
    *,
    recall_rows: RecallRows,
    choices: Choices,
    batch_size: int,
    report: Callable[[int, dict], None] = lambda layer, scores: None,
) -> dict:
    """Scores of the teacher and of every variant with one layer replaced.

    Returns {"teacher": {"csr", "recall"}, "csr": [L], "recall": [L], "kl": [L]}: the choice probe's and the recall
    probe's accuracy, and the mean KL(teacher || variant) in nats a token over the recall rows. `report` is told each
    layer's scores as they come.
    """
    hidden = variant_hidden(teacher, student)

    @jax.jit
    def nll(params, mixer_params, replaced_L, tokens_BT, targets_BT, segment_ids_BT):
        states = hidden(params, mixer_params, replaced_L, tokens_BT, segment_ids_BT)
        return project_nll(states, teacher.head(params), targets_BT, segment_ids_BT)

    @jax.jit
    def nll_and_kl(params, mixer_params, replaced_L, tokens_BT, targets_BT, segment_ids_BT):
        got = hidden(params, mixer_params, replaced_L, tokens_BT, segment_ids_BT)
        wanted = teacher.hidden(params, tokens_BT, segment_ids_BT)
        head = teacher.head(params)
        kl = linear_kl(got, head, wanted, head, segment_ids_BT >= 0)
        return project_nll(got, head, targets_BT, segment_ids_BT), kl

    def scores(replaced: Sequence[bool]) -> dict:
        weights = (params, mixer_params, np.asarray(replaced))
        divergences: list[tuple[float, float]] = []

        def recalled(tokens_BT, targets_BT, segment_ids_BT):
            found, (mean, count) = nll_and_kl(*weights, tokens_BT, targets_BT, segment_ids_BT)
            divergences.append((float(mean), float(count)))
            return found

        with mesh_of(params):
            found = {
                "csr": choice(partial(nll, *weights), None, choices, batch_size=batch_size),
                "recall": recall(recalled, None, recall_rows, batch_size=batch_size),
            }
        kls, counts = zip(*divergences, strict=True)
        return found | {"kl": float(np.average(kls, weights=counts))}

    num_layers = teacher.config.num_layers
    measured: dict = {"teacher": scores([False] * num_layers), "csr": [], "recall": [], "kl": []}
    for layer in range(num_layers):
        found = scores([i == layer for i in range(num_layers)])
        report(layer, found)
        for name in ("csr", "recall", "kl"):
            measured[name].append(found[name])
    return measured
