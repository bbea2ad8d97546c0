"""Mixers by name. Each file holds one mixer: its parameters, forward, cache, and transfer from attention."""

from __future__ import annotations

from types import ModuleType

from hypenet_jax.model.mixers import attention, lightning

BY_NAME: dict[str, ModuleType] = {"attention": attention, "lightning": lightning}
