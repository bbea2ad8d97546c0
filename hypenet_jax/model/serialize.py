"""ModelConfig <-> plain dict of JSON values, for our own checkpoints and work directories."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hypenet_jax.errors import HypenetError
from hypenet_jax.model.config import LightningConfig, LogitsScaling, ModelConfig, RopeScaling

# Fields of ModelConfig that are dataclasses themselves.
_NESTED: dict[str, type] = {"rope_scaling": RopeScaling, "logits_scaling": LogitsScaling, "lightning": LightningConfig}
_TUPLES = ("mixers", "eos_ids")


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """The config as dicts, lists, strings, numbers, booleans and None."""
    values = dataclasses.asdict(config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `config_to_dict`; absent fields take their defaults.

    Raises:
      HypenetError: an unknown or missing key, by name, or a value that ModelConfig refuses.
    """
    fields = _checked_keys("the model config", ModelConfig, values)
    for name, kind in _NESTED.items():
        if fields.get(name) is not None:
            if not isinstance(fields[name], Mapping):
                raise HypenetError(f"{name} of the model config is {fields[name]!r}; it must be a mapping or null")
            fields[name] = kind(**_checked_keys(f"{name} of the model config", kind, fields[name]))
    for name in _TUPLES:
        if name in fields:
            if not isinstance(fields[name], (list, tuple)):
                raise HypenetError(f"{name} of the model config is {fields[name]!r}; it must be a list")
            fields[name] = tuple(fields[name])
    return ModelConfig(**fields)


def _checked_keys(what: str, kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise HypenetError(f"{what} has the unknown key {unknown[0]!r}; known keys are {', '.join(known)}")
    for name, field in known.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and name not in values:
            raise HypenetError(f"{what} lacks the key {name!r}; add it")
    return dict(values)
