"""Load a model from wherever it lies: a Hugging Face directory, a GGUF file, or a checkpoint of ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hypenet_jax.errors import HypenetError
from hypenet_jax.hub import gguf_model, params
from hypenet_jax.hub.config_json import token_id, token_ids
from hypenet_jax.hub.families import FAMILIES, family_of
from hypenet_jax.hub.gguf_tokenizer import read_tokenizer
from hypenet_jax.hub.layout import Tensor
from hypenet_jax.hub.params import Place
from hypenet_jax.hub.weights_in import StoredWeights, open_weights, read_json
from hypenet_jax.model import LanguageModel, ModelConfig
from hypenet_jax.model.serialize import config_from_dict

CHECKPOINT = "hypenet_checkpoint.json"

# Where a checkpoint's JSON lies below a stage's directory, its `checkpoints/`, or one step of it.
_CHECKPOINT_PLACES = (CHECKPOINT, f"data/{CHECKPOINT}", f"*/data/{CHECKPOINT}", f"checkpoints/*/data/{CHECKPOINT}")
# Buffers that old Llama exports store though they follow from the config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


def load(
    path: str | os.PathLike[str],
    dtype: str = "float32",
    *,
    compute_dtype: str | None = None,
    place: Place | None = None,
) -> tuple[LanguageModel, dict[str, Any]]:
    """A model and its parameters.

    Args:
      path: a Hugging Face directory (Qwen3, Llama, HypeNet), a GGUF file (llama, qwen3), or a checkpoint of ours.
      dtype: what the parameters are held in: "float32", "bfloat16" or "float16".
      compute_dtype: the model's compute dtype; as `dtype` where None.
      place: called with (path in the tree, host array) for each parameter as it is read, returns what the tree holds,
        e.g. the array put on its devices; without it the tree holds numpy arrays.

    Returns:
      (model with the tokenizer found beside the weights or None, params as a nested dict).

    Raises:
      HypenetError: nothing there, an unknown format or architecture, a setting that is not supported, or weights
        that do not belong to the config.
    """
    source = existing(path)
    wanted = params.dtype_of(dtype)
    computed = params.dtype_of(compute_dtype or dtype).name
    if source.is_file():
        config, tree, tokenizer = gguf_model.read(source, wanted, place)
    elif _is_checkpoint(source):
        config, tree = _read_checkpoint(source, wanted, place)
        tokenizer = _read_tokenizer(source, config)
    else:
        config, tree = _read_hugging_face(source, wanted, place)
        tokenizer = _read_tokenizer(source, config)
    check_vocabulary(config, tokenizer, str(source))
    return LanguageModel(config=config, dtype=computed, tokenizer=tokenizer), tree


def check(path: str | os.PathLike[str]) -> tuple[ModelConfig, Any]:
    """(config, tokenizer or None) of what `load` would give: names and shapes are looked at, no weight is read.

    Raises HypenetError as `load` does, but for what only the values of the weights tell.
    """
    source = existing(path)
    if source.is_file():
        _, config, tokenizer = gguf_model.opened(source)
    else:
        config = _checkpoint_config(source) if _is_checkpoint(source) else _stored_config(source)
        tokenizer = _read_tokenizer(source, config)
    check_vocabulary(config, tokenizer, str(source))
    return config, tokenizer


def existing(path: str | os.PathLike[str]) -> Path:
    """The path of a model to load; raises HypenetError where nothing is."""
    if "://" in os.fspath(path):
        raise HypenetError(
            f"the model {os.fspath(path)} is in no file system; mount its bucket (launch/tpu_pod.sh and launch/gke.sh "
            "do, at /mnt/buckets/BUCKET) and give the path there"
        )
    source = Path(path).expanduser()
    if not source.exists():
        raise HypenetError(f"there is no model at {source}; give a local directory or a GGUF file")
    return source


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The config of a Hugging Face directory or a GGUF file alone; raises HypenetError as `load` does."""
    source = Path(path).expanduser()
    if source.is_file():
        return gguf_model.read_config(gguf_model.GgufFile(source))
    return _config_and_tensors(source)[0]


def tokenizer_of(name: str) -> Any:
    """The data.tokenizers.Tokenizer that configs and commands name: "bytes", a model directory, its tokenizer.json, or
    a GGUF file; raises HypenetError where there is none."""
    from hypenet_jax.data.tokenizers import byte_tokenizer, load_tokenizer

    path = Path(name).expanduser()
    if name == "bytes":
        return byte_tokenizer()
    if path.suffix.lower() != ".gguf" or not path.is_file():
        return load_tokenizer(path)
    found = read_tokenizer(gguf_model.GgufFile(path).metadata, str(path))
    if found is None:
        raise HypenetError(f"{path} holds no tokenizer; give a model directory or a tokenizer.json")
    return found


def check_vocabulary(config: ModelConfig, tokenizer: Any, where: str) -> None:
    """Raise HypenetError when the tokenizer has ids that the embedding has no row for."""
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise HypenetError(
            f"the tokenizer of {where} has {tokenizer.vocab_size} tokens but the model only {config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def _is_checkpoint(directory: Path) -> bool:
    return any(next(directory.glob(pattern), None) is not None for pattern in _CHECKPOINT_PLACES)


def _config_and_tensors(directory: Path) -> tuple[ModelConfig, list[Tensor]]:
    path = directory / "config.json"
    if not path.is_file():
        ggufs = sorted(directory.glob("*.gguf")) if directory.is_dir() else []
        remedy = f"give the file {ggufs[0]} itself" if ggufs else "it is no Hugging Face directory and no checkpoint"
        raise HypenetError(f"{directory} has no config.json; {remedy}")
    values = read_json(path)
    if "model_type" not in values and (directory / "export" / "config.json").is_file():
        raise HypenetError(f"{directory} is the work directory of a run; give its model, {directory / 'export'}")
    if "model_type" not in values and "architectures" not in values and isinstance(values.get("data"), dict):
        raise HypenetError(
            f"{directory} is the work directory of a run that has no model yet; run `hypenet export` there, or give "
            "the directory of a finished stage"
        )
    family = family_of(values, str(path))
    generation = directory / "generation_config.json"
    if generation.is_file():
        values = _with_generation_ids(values, read_json(generation), str(generation))
    config = family.read_config(values, str(path))
    return config, family.tensors(config)


def _with_generation_ids(values: dict[str, Any], generation: dict[str, Any], where: str) -> dict[str, Any]:
    """config.json's end tokens first, then those that only generation_config.json names; its other ids fill gaps."""
    config_ids = token_ids(values, "eos_token_id", "config.json")
    all_ids = dict.fromkeys((*config_ids, *token_ids(generation, "eos_token_id", where)))
    merged = {**values, "eos_token_id": list(all_ids)}
    for key in ("bos_token_id", "pad_token_id"):
        if merged.get(key) is None:
            merged[key] = token_id(generation, key, where)
    return merged


def _read_hugging_face(directory: Path, dtype: np.dtype, place: Place | None) -> tuple[ModelConfig, dict[str, Any]]:
    config, tensors = _config_and_tensors(directory)
    with open_weights(directory) as weights:
        if config.tie_embeddings and "lm_head.weight" in weights.shapes:
            _check_tied(weights, directory)
        _check_stored(config, tensors, weights, directory)
        return config, params.build(tensors, weights.read, dtype, place)


def _stored_config(directory: Path) -> ModelConfig:
    """The config of a Hugging Face directory, whose weights have the names and shapes that it asks for."""
    config, tensors = _config_and_tensors(directory)
    with open_weights(directory) as weights:
        _check_stored(config, tensors, weights, directory)
    return config


def _check_stored(config: ModelConfig, tensors: list[Tensor], weights: StoredWeights, directory: Path) -> None:
    shapes = {name: shape for name, shape in weights.shapes.items() if not name.endswith(_IGNORED_SUFFIX)}
    if config.tie_embeddings:
        shapes.pop("lm_head.weight", None)
    params.check_stored(tensors, shapes, str(directory))


def _check_tied(weights: StoredWeights, directory: Path) -> None:
    embedding = weights.shapes.get("model.embed_tokens.weight")
    same = embedding == weights.shapes["lm_head.weight"] and np.array_equal(
        weights.read("lm_head.weight"), weights.read("model.embed_tokens.weight")
    )
    if not same:
        raise HypenetError(
            f"{directory} ties its head to the embedding but holds another lm_head.weight; "
            "set tie_word_embeddings to false in its config.json"
        )


def _read_checkpoint(directory: Path, dtype: np.dtype, place: Place | None) -> tuple[ModelConfig, dict[str, Any]]:
    # Imported here: only checkpoints need Orbax, whose import is slow.
    from hypenet_jax.train.checkpoint import load_params

    values, stored = load_params(directory, _host_sharding())
    config = config_from_dict(values)
    tensors = FAMILIES[config.family].tensors(config)
    params.check_params(tensors, stored)
    tree: dict[str, Any] = {}
    for tensor in tensors:
        array = np.asarray(params.lookup(stored, tensor.path)).astype(dtype, copy=False)
        params.insert(tree, tensor.path, array if place is None else place(tensor.path, array))
    return config, tree


def _checkpoint_config(directory: Path) -> ModelConfig:
    """The config of a checkpoint of ours, which holds all parameters of its model; HypenetError for one of a part."""
    from hypenet_jax.train.checkpoint import Checkpoints

    with Checkpoints(directory, read_only=True) as checkpoints:
        step = checkpoints.require_latest()
        config = config_from_dict(checkpoints.about(step)["model"])
        stored = checkpoints.stored_shapes(step)["params"]
    try:
        params.check_params(FAMILIES[config.family].tensors(config), stored)
    except HypenetError as error:
        raise HypenetError(f"{directory} is no whole model: {error}") from None
    return config


def _host_sharding() -> jax.sharding.Sharding | None:
    """The host's memory, where an accelerator may be too small; None where jax runs without its CPU backend."""
    try:
        return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return None


def _read_tokenizer(directory: Path, config: ModelConfig) -> Any:
    if not (directory / "tokenizer.json").is_file():
        return None
    from hypenet_jax.data.tokenizers import load_tokenizer

    return load_tokenizer(directory, config.eos_ids or None)
