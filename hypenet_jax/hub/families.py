"""Which family a config.json or a ModelConfig belongs to."""

from __future__ import annotations

from types import ModuleType

from hypenet_jax.errors import HypenetError
from hypenet_jax.hub import hypenet, llama, qwen3
from hypenet_jax.hub.config_json import Values

FAMILIES: dict[str, ModuleType] = {"qwen3": qwen3, "llama": llama, "hypenet": hypenet}


def family_of(values: Values, where: str) -> ModuleType:
    """The family module of a parsed config.json, by its architecture or, without one, its model type.

    Raises:
      HypenetError: an architecture that is not supported.
    """
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list):
        raise HypenetError(f"architectures in {where} is {architectures!r}; it must be a list of names")
    for module in FAMILIES.values():
        named = architectures[0] in module.ARCHITECTURES if architectures else None
        if named or (named is None and values.get("model_type") == module.MODEL_TYPE):
            return module
    what = f"architecture {architectures[0]!r}" if architectures else f"model_type {values.get('model_type')!r}"
    known = ", ".join(name for module in FAMILIES.values() for name in module.ARCHITECTURES)
    raise HypenetError(f"{where} names the {what}, which is not supported; the supported ones are {known}")
