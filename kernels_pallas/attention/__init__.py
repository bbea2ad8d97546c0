"""Softmax attention with grouped query heads, over a sequence, over a cache, or over a part of a sequence."""

from kernels_pallas.attention.api import attention, cached_attention
from kernels_pallas.attention.block import attend_block, block_gradients

__all__ = ["attend_block", "attention", "block_gradients", "cached_attention"]
