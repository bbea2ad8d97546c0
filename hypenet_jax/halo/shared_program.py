"""One compiled program for networks that differ in their positions and in the scaling of their queries alone.

RoPE at position 0 is the identity, to the bit: a layer without positions is one whose positions are all 0. What differs
then is data, and a comparison compiles for one network instead of for each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hypenet_jax.model import LanguageModel, ModelConfig, mixers, stack
from hypenet_jax.model.context import Context
from hypenet_jax.model.layers import hype_scaling

# Any number above 1, for where the scaling is not by a.
_UNUSED_A = 2.0


@dataclasses.dataclass(frozen=True)
class SharedProgram:
    """Stands for a LanguageModel where hidden states are asked of whole rows; hashable as one.

    Its parameters are {"weights": the network's, "choice": what `choice` gives}. `scaled` False leaves the scaling of
    the queries out, as training does.
    """

    config: ModelConfig
    dtype: str
    remat: bool
    scaled: bool

    def hidden(self, params: dict, tokens_BT: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Hidden states after the final norm, [B, T, D] in the compute dtype."""
        weights, chosen = params["weights"], params["choice"]

        def mix(layer: int, normed_BTD: jax.Array, context: Context) -> jax.Array:
            kind = self.config.mixers[layer]
            context = context._replace(
                positions_BT=context.positions_BT * chosen[f"{kind}_rope"],
                query_scale_BT=_scale(chosen, context.positions_BT) if self.scaled else None,
            )
            return mixers.BY_NAME[kind].forward(weights[f"layer_{layer}"]["mixer"], self.config, normed_BTD, context)

        return LanguageModel(self.config, self.dtype, self.remat).hidden(weights, tokens_BT, segment_ids, mix=mix)

    def head(self, params: dict) -> jax.Array:
        """The output projection [D, V]."""
        return stack.head(params["weights"])


def shared_program(model: LanguageModel, scaled: bool) -> SharedProgram:
    """The program of a network: the same object for all that differ in what `choice` holds alone."""
    lightning = model.config.lightning and dataclasses.replace(model.config.lightning, rope=True)
    config = dataclasses.replace(model.config, attention_rope=True, lightning=lightning, logits_scaling=None)
    return SharedProgram(config, model.dtype, model.remat, scaled)


def choice(config: ModelConfig) -> dict[str, Any]:
    """What sets a network apart within its program: int32 switches of RoPE by mixer, float32 numbers of the scaling."""
    scaling = config.logits_scaling
    hype = scaling is not None and scaling.kind == "hype"
    return {
        "attention_rope": np.int32(config.attention_rope),
        "lightning_rope": np.int32(config.lightning is not None and config.lightning.rope),
        "hype": np.bool_(hype),
        "scale": np.float32(scaling.value if scaling else 1.0),
    }


def _scale(chosen: dict[str, Any], positions_BT: jax.Array) -> jax.Array:
    a = jnp.where(chosen["hype"], chosen["scale"], _UNUSED_A)
    return jnp.where(chosen["hype"], hype_scaling(a, positions_BT), chosen["scale"])


@contextlib.contextmanager
def compiled_programs_kept(directory: pathlib.Path) -> Iterator[None]:
    """Compiled programs are kept in `directory` within, for the next training and the next start.

    Where the user has set a cache of JAX's already, that is used.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(directory.absolute()))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
