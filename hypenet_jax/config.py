"""Configs: a short Python program returns a ConfigDict, which becomes checked frozen dataclasses here."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import os
import pathlib
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.compare_settings import ComparisonConfig
from hypenet_jax.halo.settings import ConvertConfig, PretrainConfig
from hypenet_jax.parallel.presets import preset

AnyConfig = ConvertConfig | PretrainConfig | ComparisonConfig
KINDS: dict[type, str] = {
    ConvertConfig: "converting a teacher",
    PretrainConfig: "training from scratch",
    ComparisonConfig: "comparing architectures",
}


def load_config(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Run `get_config()` of a config program, apply "section.field=value" overrides and check the whole.

    A config with `variants` compares architectures, one with a `model` section alone trains from scratch, one with a
    `teacher` converts. `mesh` may be the name of a machine (see `parallel.presets`) instead of sizes by axis. Relative
    paths are taken from the current directory, except those that the program itself makes absolute.
    """
    tree = _run_program(pathlib.Path(path))
    kind: type = ComparisonConfig if "variants" in tree else PretrainConfig if "model" in tree else ConvertConfig
    for override in overrides:
        if override.startswith("mesh."):
            _name_sizes(tree)
        _apply_override(tree, override, kind)
    _name_sizes(tree)
    return from_mapping(kind, tree)


def _name_sizes(tree: dict[str, Any]) -> None:
    """The sizes of a mesh that is named by its machine, one of which may then be changed."""
    if isinstance(tree.get("mesh"), str):
        tree["mesh"] = preset(tree["mesh"])


def from_mapping(kind: type, values: Mapping[str, Any], where: str = "") -> Any:
    """Build the dataclass `kind` from nested mappings; unknown keys and wrong types raise, naming the field."""
    hints = typing.get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise HypenetError(_unknown_key(f"{where}{name}", fields))
    required = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if required:
        raise HypenetError(f"config key {where}{required[0]} is missing; give it a value")
    built = {name: _convert(hints[name], value, where + name) for name, value in values.items()}
    try:
        return kind(**built)
    except HypenetError as error:
        raise HypenetError(f"in config section {where.rstrip('.')!r}: {error}" if where else str(error)) from None


def to_mapping(config: Any) -> dict:
    """The dataclasses as nested plain dicts, JSON-able."""
    return dataclasses.asdict(config)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str] = (), where: str = "") -> list[str]:
    """Phrases "section.field was X and is Y" for every leaf that differs, save the sections and fields in `free`."""
    found = []
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if where + name in free:
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += differences(before, now, free, f"{where}{name}.")
        elif _plain(before) != _plain(now):
            found.append(f"{where}{name} was {before} and is {now}")
    return found


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _run_program(path: pathlib.Path) -> dict[str, Any]:
    """What get_config() of the program returns, as nested plain dicts."""
    if not path.is_file():
        raise HypenetError(f"config {path} is not a file; give a Python program that defines get_config()")
    module = types.ModuleType(f"hypenet_config_{path.stem}")
    module.__file__ = os.path.abspath(path)
    # A program of the user's: whatever it raises is a mistake in it.
    try:
        exec(compile(path.read_bytes(), module.__file__, "exec"), module.__dict__)
        if not hasattr(module, "get_config"):
            raise HypenetError(f"config {path} defines no get_config(); it must return an ml_collections ConfigDict")
        tree = module.get_config()
        if isinstance(tree, Mapping | ml_collections.ConfigDict):
            return ml_collections.ConfigDict(tree).to_dict()
    except HypenetError:
        raise
    except Exception as error:
        raise HypenetError(f"config {path} does not run ({_explained(error, module.__file__)}); mend it") from None
    kind = type(tree).__name__
    raise HypenetError(f"get_config() of {path} returns {kind}; it must return an ml_collections ConfigDict")


def _explained(error: Exception, file: str) -> str:
    """The kind of error, its first line, and where in the file it arose."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}" + (f", line {lines[-1]}" if lines else "")


def _apply_override(tree: dict[str, Any], override: str, kind: type) -> None:
    name, equals, text = override.partition("=")
    *sections, leaf = name.split(".")
    if not equals or not all((*sections, leaf)):
        raise HypenetError(f"--set {override!r} is not of the form section.field=value")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    node: Any = tree
    for depth, section in enumerate(sections):
        known = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
        path = ".".join(sections[: depth + 1])
        if section not in known:
            raise HypenetError(_unknown_key(path, known))
        kind = _section_type(typing.get_type_hints(kind)[section])
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise HypenetError(f"--set {override!r} names a field of {path}, which is {node!r} and has none")
    node[leaf] = value


def _section_type(hint: Any) -> type:
    options = [option for option in typing.get_args(hint) if dataclasses.is_dataclass(option)] or [hint]
    return typing.cast(type, options[0])


def _unknown_key(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known)) or 'nothing'}"
    return f"config key {name} is unknown; {remedy}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise HypenetError(f"config key {where} is {value!r}; it must be a section of fields")
        return from_mapping(typing.cast(type, hint), value, where + ".")
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise HypenetError(f"config key {where} is {value!r}; it must be a list")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise HypenetError(f"config key {where} is {value!r}; it must be a mapping")
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in dict(value).items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise HypenetError(f"config key {where} is {value!r}; it must be of type {hint.__name__}")
    return value
