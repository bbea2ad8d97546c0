"""The two probes that layer selection compares variants by: recalling a needle, and telling a real continuation."""

from __future__ import annotations

from hypenet_jax.data.packing import PackedTokens
from hypenet_jax.data.tokenizers import Tokenizer
from hypenet_jax.evals.choice import Choices, make_choices
from hypenet_jax.evals.niah_samples import make_samples
from hypenet_jax.evals.recall import RecallRows, recall_rows
from hypenet_jax.halo import corpus
from hypenet_jax.halo.settings import SelectConfig


def probes(
    settings: SelectConfig, tokenizer: Tokenizer, heldout: PackedTokens, seed: int
) -> tuple[RecallRows, Choices]:
    """(`questions` needles in noise and in held-out prose, `questions` choices between held-out continuations).

    They stand in for the paper's recall and common-sense benchmarks (arXiv 2601.22156, layer selection). Raises
    HypenetError where the length is too short for a needle, or too few held-out documents are long enough.
    """
    prose = corpus.heldout_prose(heldout, tokenizer)
    samples = [
        sample
        for task in ("S1", "S2-like")
        for sample in make_samples(
            task,
            tokenizer,
            settings.length,
            max(1, settings.questions // 2),
            None,
            seed,
            prose,
            answer_budget=settings.answer_budget,
            first_ids=() if tokenizer.bos_id is None else (tokenizer.bos_id,),
        )
    ]
    rows = recall_rows([s.prompt_ids for s in samples], [s.answer_ids for s in samples], settings.length)
    return rows, make_choices(heldout.documents(), settings.questions, seed=seed)
