"""The model card (README.md) of an export: front matter for the Hugging Face Hub, what is known, and a seal.

The seal is a last line with the checksum of what stands above it. A card with a whole seal is as we wrote it and may be
replaced; one that somebody has edited has a broken seal, and stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypenet_jax import __version__
from hypenet_jax.errors import HypenetError
from hypenet_jax.hub import directory as directories
from hypenet_jax.hub.gguf_model import GgufFile
from hypenet_jax.model import ModelConfig

CARD = "README.md"
PIPELINE = "text-generation"
# What of a teacher's card holds for what is made of it.
_LICENSE_KEYS = ("license", "license_name", "license_link")
# The Hub's identifier of a license, by what the head of its text says.
_TEXTS = {"apache-2.0": ("Apache License", "Version 2.0"), "mit": ("MIT License",)}
_SEAL = re.compile(r"\n<!-- written by hypenet_jax [^,\n]*, sha256 ([0-9a-f]{64}) -->\n$")


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that another is made of, as far as its files say.

    name: of its directory or file. repository: "owner/name" on the Hub, where its files name it. license: the front
    matter's keys ("license", "license_name", "license_link"), those that are known.
    """

    name: str
    repository: str | None = None
    license: tuple[tuple[str, str], ...] = ()


def source_of(path: str | os.PathLike[str]) -> Source:
    """What a Hugging Face directory or a GGUF file says of itself; only its name where there is nothing to read."""
    place = Path(path).expanduser()
    if place.suffix.lower() == ".gguf":
        return _gguf_source(place)
    values: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        values = json.loads((place / "config.json").read_text(encoding="utf-8"))
    named = values.get("_name_or_path") if isinstance(values, dict) else None
    front = front_matter(_text(place / CARD))
    license = tuple((key, front[key]) for key in _LICENSE_KEYS if front.get(key))
    return Source(place.resolve().name, named if _is_repository(named) else None, license or _license_file(place))


def front_matter(text: str) -> dict[str, str]:
    """The plain "key: value" lines of a card's front matter; lists and nested values are left out."""
    block = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", text, re.DOTALL)
    lines = re.findall(r"^([A-Za-z_]+):[ \t]+(\S.*?)[ \t\r]*$", block[1], re.MULTILINE) if block else []
    return {key: value.strip("\"'") for key, value in lines}


def card(title: str, sections: Sequence[str], source: Source | None = None, tags: Sequence[str] = ()) -> str:
    """The card's text: front matter, a title, the sections (markdown), the seal. Absent facts have no line."""
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in (source.license if source else ()))]
    if source is not None:
        lines += [f"base_model: {json.dumps(source.repository or source.name)}"]
    lines += ["library_name: hypenet_jax", f"pipeline_tag: {PIPELINE}", "tags:", *(f"- {tag}" for tag in tags), "---"]
    return sealed("\n\n".join(["\n".join(lines), f"# {title}", *(one.strip() for one in sections if one)]) + "\n")


def short_card(config: ModelConfig, dtype: str, source: Source | None = None) -> str:
    """The card of a model of which nothing is known but its config (and what it was read from)."""
    return card(_title(config), [described(config, dtype), usage()], source, tags_of(config))


def described(config: ModelConfig, dtype: str) -> str:
    """Sizes and mixers in a list."""
    lines = [
        f"- {config.num_layers} layers of width {config.hidden_size}, feed-forward {config.intermediate_size}",
        f"- {config.num_heads} query and {config.num_kv_heads} key heads of {config.head_dim}",
        f"- vocabulary {config.vocab_size}, {'tied' if config.tie_embeddings else 'untied'} head",
        f"- weights stored in {dtype}",
    ]
    if config.family == "hypenet":
        softmax = ", ".join(map(str, config.attention_layers)) or "none"
        lines.append(f"- softmax attention in layers {softmax} (counted from 0), Lightning attention in the others")
        words = {True: "with RoPE", False: "without RoPE"}
        rnn = f", Lightning layers {words[config.lightning.rope]}" if config.lightning is not None else ""
        lines.append(f"- attention layers {words[config.attention_rope]}{rnn}")
    if config.logits_scaling is not None:
        scaling = config.logits_scaling
        formula = f"ln(t + a) / ln(a), a = {scaling.value:g}" if scaling.kind == "hype" else f"{scaling.value:g}"
        lines.append(f"- queries of the attention layers times {formula}")
    return "\n".join(["## The network", "", *lines])


def usage() -> str:
    """How the directory is read."""
    lines = ["import hypenet_jax as hn", "", 'model, params = hn.load("this directory")']
    return "\n".join(["## Use", "", "```python", *lines, "```"])


def tags_of(config: ModelConfig) -> list[str]:
    if config.family != "hypenet":
        return ["jax", config.family]
    return ["jax", "hypenet", "halo", "hybrid", "linear-attention", "lightning-attention", "long-context"]


def sealed(body: str) -> str:
    """The text with its seal."""
    digest = hashlib.sha256(body.encode("utf-8")).hexdigest()
    return f"{body}\n<!-- written by hypenet_jax {__version__}, sha256 {digest} -->\n"


def is_ours(text: str) -> bool:
    """Whether a card is as we wrote it."""
    seal = _SEAL.search(text)
    return seal is not None and hashlib.sha256(text[: seal.start()].encode("utf-8")).hexdigest() == seal[1]


def kept_card(directory: Path) -> str | None:
    """The card of an export that somebody has edited; None where there is none or it is ours."""
    text = _text(directory / CARD)
    return text if text and not is_ours(text) else None


def replace_card(directory: str | os.PathLike[str], text: str) -> bool:
    """Put a new card into an export of ours; False, and nothing done, where the card there was edited.

    Raises HypenetError where the directory is no export of ours, or cannot be written.
    """
    place = Path(directory)
    directories.check_replaceable(place)
    if kept_card(place) is not None:
        return False
    try:
        # The marker first: a directory that lists a file too many is still ours, the other way round it is not.
        directories.list_file(place, CARD)
        directories.replace_file(place / CARD, text)
    except OSError as error:
        raise HypenetError(f"{place / CARD} cannot be written ({error.strerror}); make room or allow it") from error
    return True


def _title(config: ModelConfig) -> str:
    return f"A {config.family} model of {config.num_layers} layers"


def _gguf_source(path: Path) -> Source:
    if not path.is_file():
        return Source(path.stem)
    file = GgufFile(path)
    license = file.metadata("general.license")
    known = (("license", license),) if isinstance(license, str) and license else ()
    return Source(path.stem, None, known)


def _license_file(directory: Path) -> tuple[tuple[str, str], ...]:
    head = _text(directory / "LICENSE")[:500]
    found = [name for name, words in _TEXTS.items() if all(word in head for word in words)]
    return (("license", found[0]),) if len(found) == 1 else ()


def _is_repository(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return ""
