"""Softmax attention with grouped query heads, over a sequence or over a cache."""

from kernels_pallas.attention.api import attention, cached_attention

__all__ = ["attention", "cached_attention"]
