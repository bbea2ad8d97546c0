"""HALO: transfer, align, select, distill, finetune, fit the scaling; `pipeline` holds their order."""

from hypenet_jax.halo import select

__all__ = ["select"]
