"""Save a model as a Hugging Face directory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hypenet_jax.hub import params as parameters
from hypenet_jax.hub.card import CARD, kept_card, short_card
from hypenet_jax.hub.config_json import token_values
from hypenet_jax.hub.directory import check_replaceable, new_directory
from hypenet_jax.hub.families import FAMILIES
from hypenet_jax.hub.loading import check_vocabulary
from hypenet_jax.hub.weights_out import MAX_SHARD_BYTES, write_weights
from hypenet_jax.model import LanguageModel
from hypenet_jax.parallel.processes import first, is_writer, on_writer


def save(
    model: LanguageModel,
    params: Mapping[str, Any],
    directory: str | os.PathLike[str],
    dtype: str = "float32",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    card: str | None = None,
) -> None:
    """Write config.json, safetensors, tokenizer files, generation_config.json, a model card and a marker file.

    The directory appears whole or not at all. An empty directory and a previous export of ours are replaced; a card
    that was edited there is kept.

    Args:
      model: its config's family decides the format ("qwen3", "llama" or "hypenet"); its tokenizer is written along.
      params: the parameter tree, numpy or jax arrays. Arrays that lie over several processes are gathered one at a
        time; then every process has to call this, and process 0 alone writes.
      directory: where to write.
      dtype: what the weights are stored in: "float32" (exact for float32 parameters), "bfloat16" or "float16".
      max_shard_bytes: the most bytes of values a safetensors file holds; one shard at a time is in memory.
      card: README.md as `hub.card.card` makes it; None writes a short one.

    Raises:
      HypenetError: a tree that is not the model's, a network that the family cannot hold, a tokenizer larger than
        the vocabulary, a directory that holds something else, or a full disk.
    """
    config = model.config
    family = FAMILIES[config.family]
    stored = parameters.dtype_of(dtype)
    values = {**family.write_config(config), "torch_dtype": dtype}
    check_vocabulary(config, model.tokenizer, str(directory))
    tensors = {tensor.name: tensor for tensor in family.tensors(config)}
    parameters.check_params(list(tensors.values()), params)
    shapes = {name: tensor.stored_shape for name, tensor in tensors.items()}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        array = on_writer(parameters.lookup(params, tensor.path))
        return np.empty(0) if array is None else tensor.write(array)

    def write() -> None:
        text = kept_card(Path(directory)) or card or short_card(config, dtype)
        needed = sum(math.prod(shape) for shape in shapes.values()) * stored.itemsize
        with new_directory(Path(directory), needed, {"family": config.family, "dtype": dtype}) as temporary:
            _write_json(temporary / "config.json", values)
            _write_json(temporary / "generation_config.json", {"_from_model_config": True, **token_values(config)})
            (temporary / CARD).write_text(text, encoding="utf-8")
            write_weights(temporary, shapes, read, stored, max_shard_bytes)
            if model.tokenizer is not None:
                model.tokenizer.save(temporary)

    # What can be wrong with the place is said before the others begin to gather.
    first(lambda: check_replaceable(Path(directory).resolve()))
    if not is_writer():
        for name in shapes:
            read(name)
    first(write)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
