"""The variants that layer selection compares: the teacher with any set of layers replaced by stage-1 students."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hypenet_jax.evals.choice import Choices, choice
from hypenet_jax.evals.recall import RecallRows, recall
from hypenet_jax.evals.token_nll import padded_rows, project_nll
from hypenet_jax.model import LanguageModel, mixers, stack
from kernels_pallas.cross_entropy.api import linear_kl


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

        return stack.forward(params, teacher.config, tokens_BT, segment_ids_BT, dtype=jnp.dtype(teacher.dtype), mix=mix)

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
    def divergence(params, mixer_params, replaced_L, tokens_BT, segment_ids_BT):
        got = hidden(params, mixer_params, replaced_L, tokens_BT, segment_ids_BT)
        wanted = teacher.hidden(params, tokens_BT, segment_ids_BT)
        head = teacher.head(params)
        return linear_kl(got, head, wanted, head, segment_ids_BT >= 0)

    def scores(replaced: Sequence[bool]) -> dict:
        flags = jnp.asarray(replaced)

        def token_nll(tokens_BT, targets_BT, segment_ids_BT):
            return nll(params, mixer_params, flags, tokens_BT, targets_BT, segment_ids_BT)

        kls, counts = [], []
        for start in range(0, len(recall_rows.tokens), batch_size):
            tokens_BT = padded_rows(recall_rows.tokens, start, batch_size)
            ids_BT = padded_rows(recall_rows.segment_ids, start, batch_size, fill=-1)
            mean, count = divergence(params, mixer_params, flags, tokens_BT, ids_BT)
            kls.append(float(mean))
            counts.append(float(count))
        return {
            "csr": choice(token_nll, None, choices, batch_size=batch_size),
            "recall": recall(token_nll, None, recall_rows, batch_size=batch_size),
            "kl": float(np.average(kls, weights=counts)),
        }

    num_layers = teacher.config.num_layers
    measured: dict = {"teacher": scores([False] * num_layers), "csr": [], "recall": [], "kl": []}
    for layer in range(num_layers):
        found = scores([i == layer for i in range(num_layers)])
        report(layer, found)
        for name in ("csr", "recall", "kl"):
            measured[name].append(found[name])
    return measured
