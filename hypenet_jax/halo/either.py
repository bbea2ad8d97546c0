"""A hybrid whose layers choose their mixer by a traced flag: one compiled program trains and evaluates every choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from hypenet_jax.model import LanguageModel, mixers, stack
from hypenet_jax.train.losses import distill_loss


@dataclasses.dataclass(frozen=True)
class EitherModel:
    """The students of all choices of layers in one: parameters are {"weights", "attention_L"} where a model is asked.

    weights: the parameters of a student, but each layer's "mixer" is {"attention": .., "lightning": ..}; attention_L:
    bool [L], the layers that keep attention. A layer runs one of its mixers alone. Has what the evaluation of whole
    rows needs of a `LanguageModel`.
    """

    student: LanguageModel

    def hidden(self, params: dict, tokens_BT: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Hidden states after the final norm, [B, T, D] in the compute dtype."""
        weights, attention_L, student = params["weights"], params["attention_L"], self.student

        def mix(layer, normed_BTD, context):
            own = weights[f"layer_{layer}"]["mixer"]
            return jax.lax.cond(
                attention_L[layer],
                lambda x: mixers.attention.forward(own["attention"], student.config, x, context),
                lambda x: mixers.lightning.forward(own["lightning"], student.config, x, context),
                normed_BTD,
            )

        return student.hidden(weights, tokens_BT, segment_ids, mix=mix)

    def head(self, params: dict) -> jax.Array:
        """The output projection [D, V]."""
        return stack.head(params["weights"])


def either_tree(attention: dict, lightning: dict, num_layers: int) -> dict:
    """One tree out of that of a student of attention layers and of one of Lightning layers; the rest is the first's."""
    both = dict(attention)
    for layer in range(num_layers):
        name = f"layer_{layer}"
        pair = {"attention": attention[name]["mixer"], "lightning": lightning[name]["mixer"]}
        both[name] = attention[name] | {"mixer": pair}
    return both


def either_loss(teacher: LanguageModel, model: EitherModel, token_chunk: int | None) -> Callable:
    """`distill.distillation_loss` of the choice in frozen["attention_L"]; frozen["teacher"] is the teacher.

    The mixer that a layer does not run has gradients of zero, so AdamW without weight decay leaves it as it is.
    """

    def loss(weights: dict, frozen: dict, batch: dict):
        params = {"weights": weights, "attention_L": frozen["attention_L"]}
        own = frozen["teacher"]
        wanted = jax.lax.stop_gradient(teacher.hidden(own, batch["tokens"], batch["segment_ids"]))
        got = model.hidden(params, batch["tokens"], batch["segment_ids"])
        return distill_loss(got, model.head(params), wanted, teacher.head(own), batch, token_chunk=token_chunk)

    return loss
