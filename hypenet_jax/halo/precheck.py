"""What a config asks of the devices, the teacher and the text, tried before any training: errors cost no hours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jax.sharding import Mesh

from hypenet_jax.data.packing import PackedTokens
from hypenet_jax.data.sources import read_documents
from hypenet_jax.data.tokenizers import Tokenizer
from hypenet_jax.errors import HypenetError
from hypenet_jax.evals import suite
from hypenet_jax.halo import corpus, select, transfer
from hypenet_jax.halo.gates import gate_stage
from hypenet_jax.halo.probes import probes
from hypenet_jax.halo.settings import ConvertConfig, EvaluateConfig
from hypenet_jax.model import LanguageModel, ModelConfig
from hypenet_jax.parallel.rules import param_shardings, rules_of
from hypenet_jax.train.loop import check_rows

STAGES = ("align", "distill", "finetune")


def check_plan(config: ConvertConfig, teacher: ModelConfig, mesh: Mesh) -> None:
    """Raise HypenetError where batches do not divide over the mesh, or the chosen layers do not fit the teacher."""
    for name in STAGES:
        with section(name):
            check_rows(getattr(config, name), mesh)
    with section("student"):
        wanted = config.student
        student = transfer.student_of(teacher, wanted.attention_layers or (), wanted.position, wanted.qk_norm)
    with section("rules"):
        model = LanguageModel(student)
        param_shardings(model.param_axes(), model.param_shapes(), mesh, rules_of(config.rules))
    with section("select"):
        settings, num_layers = config.select, teacher.num_layers
        if config.student.attention_layers is None and settings.scores is not None:
            select.choose(select.read_scores(settings.scores, num_layers), num_layers, settings.method, settings.keep)
        elif config.student.attention_layers is None and settings.method not in select.NEEDS:
            select.choose({}, num_layers, settings.method, settings.keep)
        else:
            select.kept(num_layers, settings.keep)
    if searches(config):
        check_gate(config, mesh)


def check_gate(config: ConvertConfig, mesh: Mesh) -> None:
    """Raise HypenetError where the gate search's rows do not divide over the mesh, or its source gives no document."""
    with section("select"):
        check_rows(gate_stage(config.select.gate), mesh)
        next(read_documents(config.select.gate.retrieval))


def check_text(
    config: ConvertConfig,
    tokenizer: Tokenizer,
    text: PackedTokens,
    heldout: PackedTokens,
    finetune_text: PackedTokens | None = None,
) -> None:
    """Raise HypenetError where a stage, a probe, the fit or the evaluation asks for text that there is not."""
    read = {"align": text, "distill": text, "finetune": finetune_text or text}
    for name in STAGES:
        with section(name):
            corpus.stage_batches(read[name], getattr(config, name), 0, config.seed, config.data.workers)
    if config.finetune_loss == "completions":
        _check_completions(config, read["finetune"])
    if measures(config) and not searches(config):
        with section("select"):
            probes(config.select, tokenizer, heldout, config.seed)
    with section("fit_scale"):
        corpus.long_documents(heldout, config.fit_scale.length, config.fit_scale.documents)
    check_evaluation(config.evaluate, tokenizer, heldout, config.evaluate.needle_seed(config.seed))


def _check_completions(config: ConvertConfig, text: PackedTokens) -> None:
    """Raise HypenetError where stage 3 is to learn what an assistant wrote, and reads nothing of the kind."""
    if text.info.chat_template is None:
        sources = "finetune_sources" if config.finetune_sources else "data.sources"
        raise HypenetError(
            f"finetune_loss is 'completions' but {sources} hold no conversation to train on; add more with messages, "
            "or use 'all'"
        )
    start = corpus.stage_start(config, "finetune")
    batches = corpus.stage_batches(text, config.finetune, start, config.seed, 0, completions=True)
    if not batches.learns():
        read = corpus.stage_tokens(config.finetune)
        raise HypenetError(
            f"finetune_loss is 'completions' but none of the {read:,} tokens that stage finetune reads was written by "
            "an assistant; shorten the other turns, give other conversations, or use 'all'"
        )


def check_evaluation(
    settings: EvaluateConfig, tokenizer: Tokenizer, heldout: PackedTokens, seed: int, name: str = "evaluate"
) -> None:
    """Raise HypenetError where no held-out document is as long as perplexity needs, or a length holds no needle."""
    with section(name):
        _, essays = corpus.measured_text(settings, heldout, tokenizer)
        suite.prompt_ids(tokenizer, settings.prompts, settings.chat)
        for task in settings.tasks:
            shortest = min((*settings.lengths, *settings.scale_lengths))
            suite.needle_samples(tokenizer, settings, task, shortest, essays, seed)


def measures(config: ConvertConfig) -> bool:
    """Whether layer selection measures or trains, because neither layers nor scores are given."""
    given = config.student.attention_layers is not None or config.select.scores is not None
    return not given and config.select.method in select.NEEDS


def searches(config: ConvertConfig) -> bool:
    """Whether layer selection is the gate search, which has no probes."""
    return measures(config) and config.select.method == "gate-search"


@contextlib.contextmanager
def section(name: str) -> Iterator[None]:
    """Name the config section in the body's errors."""
    try:
        yield
    except HypenetError as error:
        raise HypenetError(f"in config section {name!r}: {error}") from None
