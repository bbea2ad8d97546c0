"""Losses that meet the vocabulary in token chunks: never an array [tokens, vocabulary]."""

from kernels_pallas.cross_entropy.api import linear_cross_entropy, linear_kl, linear_kl_from_top_k

__all__ = ["linear_cross_entropy", "linear_kl", "linear_kl_from_top_k"]
