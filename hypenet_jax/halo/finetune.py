"""Stage 3 of HALO, and training from scratch: next-token cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

from hypenet_jax.model import LanguageModel
from hypenet_jax.train.losses import lm_loss


def next_token_loss(model: LanguageModel, token_chunk: int | None) -> Callable:
    """loss(params, frozen, batch) -> (cross-entropy, metrics), mean over tokens whose target is in their document."""

    def loss(params: dict, frozen: object, batch: dict):
        hidden = model.hidden(params, batch["tokens"], batch["segment_ids"])
        return lm_loss(hidden, model.head(params), batch, token_chunk=token_chunk)

    return loss
