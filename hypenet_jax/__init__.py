"""HypeNet and HALO in JAX: a pretrained Transformer becomes a long-context hybrid.

    import hypenet_jax as hn
    model, params = hn.load("Qwen3-1.7B")
    student, sparams = hn.convert(model, params, attention_layers=[2, 3])

Names load on first use, so that `import hypenet_jax` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypenet_jax.halo.transfer import convert
    from hypenet_jax.hub import load, save
    from hypenet_jax.inference import generate

__version__ = "0.1.0"

_HOMES = {
    "convert": "hypenet_jax.halo.transfer",
    "generate": "hypenet_jax.inference",
    "load": "hypenet_jax.hub",
    "save": "hypenet_jax.hub",
    "LanguageModel": "hypenet_jax.model",
    "ModelConfig": "hypenet_jax.model",
    "HypenetError": "hypenet_jax.errors",
}
_PACKAGES = ("data", "evals", "halo", "hub", "inference", "model", "parallel", "train")

__all__ = ["convert", "generate", "load", "save"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_PACKAGES})
