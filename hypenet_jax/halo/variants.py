"""The variants that layer selection compares: the teacher with any set of layers replaced by stage-1 students."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import jax
import numpy as np

from hypenet_jax.evals.choice import Choices, choice
from hypenet_jax.evals.recall import RecallRows, recall
from hypenet_jax.evals.token_nll import project_nll
from hypenet_jax.model import LanguageModel, mixers
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

        return teacher.hidden(params, tokens_BT, segment_ids_BT, mix=mix)

    return hidden


@lru_cache(maxsize=1)
def _programs(teacher: LanguageModel, student: LanguageModel) -> tuple[Callable, Callable]:
    """(nll, nll and KL) of a variant, compiled once for all variants and for every later measurement of these two."""
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

    return nll, nll_and_kl


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
    costs: dict | None = None,
) -> dict:
    """Scores of the teacher and of every variant with one layer replaced.

    Returns {"teacher": {"csr", "recall"}, "csr": [L], "recall": [L], "kl": [L]}: the choice probe's and the recall
    probe's accuracy, and the mean KL(teacher || variant) in nats a token over the recall rows. `report` is told each
    layer's scores as they come. `costs` gets {score: {"tokens", "seconds"}} of what was run for each; recall and KL are
    read off the same rows at once.
    """
    nll, nll_and_kl = _programs(teacher, student)
    spent = _Costs(costs)

    def scores(replaced: Sequence[bool]) -> dict:
        weights = (params, mixer_params, np.asarray(replaced))
        with mesh_of(params):
            with spent.on(("csr",), choices.tokens.size):
                csr = choice(partial(nll, *weights), None, choices, batch_size=batch_size)
            with spent.on(("recall", "kl"), recall_rows.tokens.size):
                recalled, kl = _recall_and_kl(partial(nll_and_kl, *weights), recall_rows, batch_size)
        return {"csr": csr, "recall": recalled, "kl": kl}

    num_layers = teacher.config.num_layers
    measured: dict = {"teacher": scores([False] * num_layers), "csr": [], "recall": [], "kl": []}
    for layer in range(num_layers):
        found = scores([i == layer for i in range(num_layers)])
        report(layer, found)
        for name in ("csr", "recall", "kl"):
            measured[name].append(found[name])
    return measured


def measure_restored(
    teacher: LanguageModel,
    params: dict,
    student: LanguageModel,
    mixer_params: dict,
    *,
    recall_rows: RecallRows,
    batch_size: int,
    between: Callable[[], None] = lambda: None,
    costs: dict | None = None,
) -> list[float]:
    """[L] KL(teacher || the model that has the attention of layer i alone), nats a token over the recall rows.

    KL-LS (arXiv 2512.20569) restores one layer of an all-linear student and trains each such student on 700M tokens;
    here the stage-1 mixers are taken as they are and nothing is trained. `between` is called after each layer.
    """
    _, nll_and_kl = _programs(teacher, student)
    spent, num_layers, found = _Costs(costs), teacher.config.num_layers, []
    for layer in range(num_layers):
        weights = (params, mixer_params, np.arange(num_layers) != layer)
        with mesh_of(params), spent.on(("restored_kl",), recall_rows.tokens.size):
            found.append(_recall_and_kl(partial(nll_and_kl, *weights), recall_rows, batch_size)[1])
        between()
    return found


def _recall_and_kl(nll_and_kl: Callable, rows: RecallRows, batch_size: int) -> tuple[float, float]:
    divergences: list[tuple[float, float]] = []

    def recalled(tokens_BT, targets_BT, segment_ids_BT):
        found, (mean, count) = nll_and_kl(tokens_BT, targets_BT, segment_ids_BT)
        divergences.append((float(mean), float(count)))
        return found

    share = recall(recalled, None, rows, batch_size=batch_size)
    kls, counts = zip(*divergences, strict=True)
    return share, float(np.average(kls, weights=counts))


class _Costs:
    """Adds tokens and seconds up by the scores that they were spent on."""

    def __init__(self, costs: dict | None):
        self._costs = {} if costs is None else costs

    @contextlib.contextmanager
    def on(self, names: Sequence[str], tokens: int) -> Iterator[None]:
        start = time.monotonic()
        yield
        for name in names:
            cell = self._costs.setdefault(name, {"tokens": 0, "seconds": 0.0})
            cell["tokens"] += int(tokens)
            cell["seconds"] += time.monotonic() - start
