"""Floating-point operations by closed form: XLA's own count knows no Pallas kernel and takes loops for one turn.

A multiplication with its addition is two operations; what is no matrix product (norms, RoPE, softmax) is not counted.
Per token of a row of T tokens:

- a matrix of N entries: 2N forward, 4N backward (its gradient and its input's);
- attention of H heads of width d: 2 T H d forward (two products over T/2 earlier tokens on average), 2.5 times that
  backward (the kernel makes the scores again: five products for two);
- Lightning, each head of width d, in chunks of C = 128: 4 d^2 + 4 C d forward, 10 d^2 + 12 C d backward;
- the vocabulary: 2 D V a product. KL makes four of them (student's and teacher's logits, two gradients), cross entropy
  three: the gradients come out of the forward sweep.

With `remat` a layer's forward is made twice, save its last product (`down`), whose result nothing in the layer needs.
The teacher runs forward only. Stage 1 trains the mixers alone: their inputs need no gradient.

T, the length, may be a mean over tokens where rows hold several documents: attention is linear in it.

`model_flops` is what MFU counts: nothing twice, so neither `remat`'s second forward nor what the kernels make again in
the backward pass, which is then twice the forward.
"""

from __future__ import annotations

import math
from typing import Any

from hypenet_jax.model import ModelConfig, mixers
from hypenet_jax.model.parameters import Parameter

CHUNK = 128


def training_flops(stage: str, teacher: ModelConfig, student: ModelConfig, length: float, remat: bool) -> float:
    """Operations per token of a training stage ("align", "distill", "finetune") over rows of `length` tokens."""
    if stage == "align":
        return _alignment(teacher, student, length)
    logits = 2 * student.hidden_size * student.vocab_size
    own = sum(_layer(student, layer, length, remat) for layer in range(student.num_layers))
    if stage == "finetune":
        return own + 3 * logits
    teachers = forward_flops(teacher, length, head=True)
    return own + teachers + 3 * logits


def model_flops(stage: str, teacher: ModelConfig, student: ModelConfig, length: float) -> float:
    """Operations per token that a training stage asks for in itself: `training_flops` with nothing made twice."""
    mixing = [_mixing(student, layer, length) for layer in range(student.num_layers)]
    again = sum(backward - 2 * forward for forward, backward in mixing)
    return training_flops(stage, teacher, student, length, remat=False) - again


def forward_flops(config: ModelConfig, length: float, head: bool) -> float:
    """Operations per token of a forward pass over `length` tokens, with the logits of every token or without any."""
    layers = sum(2 * _matrices(config, i) + _mixing(config, i, length)[0] for i in range(config.num_layers))
    return layers + (2 * config.hidden_size * config.vocab_size if head else 0)


def cached_flops(config: ModelConfig, width: int, cached: int) -> float:
    """Operations per token of a step of `width` tokens onto a cache of `cached` tokens; logits of its last token."""
    total = 2 * config.hidden_size * config.vocab_size / width
    for layer, mixer in enumerate(config.mixers):
        total += 2 * _matrices(config, layer)
        if mixer == "attention":
            total += 4 * config.num_heads * config.head_dim * (cached + width / 2)
        elif width > 1:
            total += _mixing(config, layer, width)[0]
        else:
            total += 4 * _lightning_heads(config) * _lightning_width(config) ** 2
    return total


def _layer(config: ModelConfig, layer: int, length: float, remat: bool) -> float:
    mixing, mixing_back = _mixing(config, layer, length)
    matrices = _matrices(config, layer)
    again = 2 * (matrices - config.hidden_size * config.intermediate_size) + mixing if remat else 0
    return 6 * matrices + mixing + mixing_back + again


def _alignment(teacher: ModelConfig, student: ModelConfig, length: float) -> float:
    total = forward_flops(teacher, length, head=False)
    # Nothing above the last mixer is made.
    total -= 6 * teacher.hidden_size * teacher.intermediate_size
    for layer in range(student.num_layers):
        table = _mixer_matrices(student, layer)
        mixing, mixing_back = _mixing(student, layer, length)
        # Forward and its gradient for all; the gradient of the input only for the output projection.
        total += 4 * sum(table.values()) + 2 * table["o"] + mixing + mixing_back
    return total


def _matrices(config: ModelConfig, layer: int) -> int:
    feed_forward = 3 * config.hidden_size * config.intermediate_size
    return sum(_mixer_matrices(config, layer).values()) + feed_forward


def _mixer_matrices(config: ModelConfig, layer: int) -> dict[str, int]:
    """Entries of the mixer's projections by name, norms left out."""
    table: dict[str, Any] = mixers.BY_NAME[config.mixers[layer]].parameters(config)
    found: dict[str, Parameter] = {name: entry for name, entry in table.items() if "embed" in entry.axes}
    return {name: math.prod(entry.shape) for name, entry in found.items()}


def _mixing(config: ModelConfig, layer: int, length: float) -> tuple[float, float]:
    """Forward and backward operations per token of what is between the projections."""
    if config.mixers[layer] == "attention":
        forward = 2.0 * length * config.num_heads * config.head_dim
        return forward, 2.5 * forward
    heads, width = _lightning_heads(config), _lightning_width(config)
    chunk = min(CHUNK, length)
    return heads * (4.0 * width**2 + 4 * chunk * width), heads * (10.0 * width**2 + 12 * chunk * width)


def _lightning_heads(config: ModelConfig) -> int:
    assert config.lightning is not None
    return config.lightning.num_heads


def _lightning_width(config: ModelConfig) -> int:
    assert config.lightning is not None
    return config.lightning.head_dim
