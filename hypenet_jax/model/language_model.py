"""A language model as its users hold it: config, compute dtype, tokenizer; parameters are always passed in."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from hypenet_jax.model import stack
from hypenet_jax.model.config import LogitsScaling, ModelConfig
from hypenet_jax.model.parameters import ParameterTable, shapes

if TYPE_CHECKING:
    from hypenet_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A network without its weights. Hashable, so that it can be a static argument of a jitted function.

    dtype is what activations and matrix products are computed in ("float32" or "bfloat16"); parameters keep the
    dtype they have. `remat` trades a second forward pass for activation memory in training. `exchange` is how attention
    gets at keys that other devices hold where positions are split: "ring", "gather" or "auto" (`parallel.sequence`).
    """

    config: ModelConfig
    dtype: str = "float32"
    remat: bool = False
    tokenizer: Tokenizer | None = dataclasses.field(default=None, compare=False, repr=False)
    exchange: str = "auto"

    def init(self, key: jax.Array) -> dict:
        """Random float32 parameters from a PRNG key."""
        return nn.unbox(self._module.init(key))["params"]

    def param_shapes(self) -> dict:
        """The parameter tree with float32 jax.ShapeDtypeStruct for leaves."""
        return shapes(stack.parameters(self.config))

    def param_axes(self) -> dict:
        """The parameter tree with tuples of logical axis names for leaves."""
        boxed = jax.eval_shape(self._module.init, jax.random.key(0))
        return jax.tree.map(tuple, nn.get_partition_spec(boxed)["params"], is_leaf=_is_spec)

    @functools.partial(jax.jit, static_argnums=0)
    def logits(self, params: dict, tokens_BT: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """float32 [B, T, V]. segment_ids int32 [B, T]: documents packed in a row; negative ids are padding."""
        return self.project(params, self.hidden(params, tokens_BT, segment_ids))

    def hidden(
        self,
        params: dict,
        tokens_BT: jax.Array,
        segment_ids: jax.Array | None = None,
        hype_a: jax.Array | None = None,
        mix: stack.Mix | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, [B, T, D] in the compute dtype; `hype_a`, `mix`: see `stack.forward`."""
        return stack.forward(
            params,
            self.config,
            tokens_BT,
            segment_ids,
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
            mix=mix,
            hype_a=hype_a,
            exchange=self.exchange,
        )

    def head(self, params: dict) -> jax.Array:
        """The output projection [D, V]."""
        return stack.head(params)

    def project(self, params: dict, hidden: jax.Array) -> jax.Array:
        """Logits, float32 [..., V], of hidden states [..., D]."""
        weight = stack.head(params).astype(hidden.dtype)
        return jnp.einsum("...d,dv->...v", hidden, weight, preferred_element_type=jnp.float32)

    def init_cache(self, batch: int, max_len: int) -> dict:
        """An empty cache for `batch` rows of at most `max_len` tokens."""
        return stack.init_cache(self.config, batch, max_len, jnp.dtype(self.dtype))

    def step(
        self,
        params: dict,
        tokens_BT: jax.Array,
        cache: dict,
        valid_BT: jax.Array | None = None,
        hype_a: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """Append tokens to the cache; see `stack.step`."""
        dtype = jnp.dtype(self.dtype)
        return stack.step(params, self.config, tokens_BT, cache, valid_BT, dtype=dtype, hype_a=hype_a)

    def with_logits_scaling(self, scaling: float | LogitsScaling | None) -> LanguageModel:
        """The same model with HyPE's query scaling s_t = ln(t+a)/ln(a) for a number a, another scaling, or none."""
        if scaling is not None and not isinstance(scaling, LogitsScaling):
            scaling = LogitsScaling("hype", float(scaling))
        return dataclasses.replace(self, config=dataclasses.replace(self.config, logits_scaling=scaling))

    @property
    def _module(self) -> Any:
        return ParameterTable(stack.parameters(self.config))


def _is_spec(leaf: object) -> bool:
    return isinstance(leaf, jax.sharding.PartitionSpec)
