"""Softmax attention with grouped query heads, over a sequence, over a cache, or over a part of a sequence."""

from kernels_pallas.attention.api import attention, cached_attention
from kernels_pallas.attention.block import attend_block, attend_cache, block_gradients

__all__ = ["attend_block", "attend_cache", "attention", "block_gradients", "cached_attention"]
