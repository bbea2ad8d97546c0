"""What a network is: sizes, mixers, position encoding. Checked once, immutable, hashable (a static jit argument)."""

from __future__ import annotations

import dataclasses
import math

from hypenet_jax.errors import HypenetError

MIXERS = ("attention", "lightning")
FAMILIES = ("qwen3", "llama", "hypenet")

# The variants that the HypeNet paper compares: RoPE in (attention layers, RNN layers).
POSITIONS = {
    "hype": (False, True),
    "rope": (True, True),
    "nope": (False, False),
    "attention_rope": (True, False),
}

# The `a` that the official code takes for "hype" without a number.
DEFAULT_HYPE_A = 362.0


@dataclasses.dataclass(frozen=True)
class LogitsScaling:
    """Scaling of the attention queries at inference.

    kind "hype": s_t = ln(t + value) / ln(value), t from 0 (arXiv 2601.22156, HyPE); kind "constant": s_t = value.
    """

    kind: str
    value: float

    def __post_init__(self):
        if self.kind not in ("hype", "constant"):
            raise HypenetError(f"logits_scaling kind is {self.kind!r}; use 'hype' or 'constant'")
        lowest = 1.0 if self.kind == "hype" else 0.0
        if not (math.isfinite(self.value) and self.value > lowest):
            raise HypenetError(
                f"logits_scaling {self.kind} value is {self.value}; it must be finite and above {lowest:g}"
            )


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling of RoPE."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self):
        if not self.factor > 0:
            raise HypenetError(f"rope_scaling factor is {self.factor}; it must be above 0")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise HypenetError(
                f"rope_scaling low_freq_factor is {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}; "
                "they must be above 0 and the low one below the high one"
            )
        if not self.original_max_position > 0:
            raise HypenetError(
                f"rope_scaling original_max_position is {self.original_max_position}; it must be above 0"
            )


@dataclasses.dataclass(frozen=True)
class LightningConfig:
    """Switches of the Lightning layers; the defaults are HypeNet's."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: bool = True
    qk_norm: bool = True
    output_norm: bool = True
    output_gate: bool = True
    scale: str = "1/sqrt(d)"  # "1/sqrt(d)", "1/d", anything else is 1

    def __post_init__(self):
        _divisible("lightning num_heads", self.num_heads, "lightning num_kv_heads", self.num_kv_heads)
        _even("lightning head_dim", self.head_dim)

    @property
    def query_scale(self) -> float:
        return {"1/sqrt(d)": self.head_dim**-0.5, "1/d": 1.0 / self.head_dim}.get(self.scale, 1.0)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder whose layers differ in their mixer alone.

    `mixers` has one entry a layer, "attention" or "lightning". A Qwen3 or Llama teacher is all "attention" with
    `attention_rope`; a HypeNet is a mixture. Token ids are None where the checkpoint names none.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mixers: tuple[str, ...]
    family: str = "qwen3"
    tie_embeddings: bool = True
    qk_norm: bool = True
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    attention_rope: bool = True
    attention_gate: bool = False
    logits_scaling: LogitsScaling | None = None
    lightning: LightningConfig | None = None
    max_position: int = 40960
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise HypenetError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.family not in FAMILIES:
            raise HypenetError(f"family is {self.family!r}; use one of {', '.join(FAMILIES)}")
        if len(self.mixers) != self.num_layers:
            raise HypenetError(f"mixers has {len(self.mixers)} entries but the model has {self.num_layers} layers")
        for layer, mixer in enumerate(self.mixers):
            if mixer not in MIXERS:
                raise HypenetError(f"mixer of layer {layer} is {mixer!r}; use one of {', '.join(MIXERS)}")
        if "lightning" in self.mixers and self.lightning is None:
            raise HypenetError("mixers name 'lightning' but the lightning settings are missing; give LightningConfig")
        _divisible("num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)
        _even("head_dim", self.head_dim)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i, mixer in enumerate(self.mixers) if mixer == "attention")


def _divisible(name: str, value: int, by_name: str, by: int) -> None:
    if by < 1 or value < 1 or value % by:
        raise HypenetError(f"{name} is {value} and {by_name} {by}; the first must be a positive multiple of the second")


def _even(name: str, value: int) -> None:
    if value < 2 or value % 2:
        raise HypenetError(f"{name} is {value}; RoPE needs an even number of at least 2")
