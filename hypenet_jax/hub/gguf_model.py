"""llama and qwen3 models out of a GGUF file: metadata -> ModelConfig, quantised tensors -> parameters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from hypenet_jax.errors import HypenetError
from hypenet_jax.hub import gguf_names, params
from hypenet_jax.hub.gguf_rope import recover_scaling
from hypenet_jax.hub.gguf_tokenizer import end_ids, first_id, read_tokenizer
from hypenet_jax.hub.params import Place
from hypenet_jax.model.config import ModelConfig

if TYPE_CHECKING:
    from hypenet_jax.data.tokenizers import Tokenizer

ARCHITECTURES = tuple(gguf_names.LAYER)

_MAGIC = b"GGUF"
_ROPE_FREQUENCIES = "rope_freqs.weight"
# Keys (below the architecture's name) that change the network in a way that is not implemented, with the values
# under which they do not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "rope.scaling.type": ("none",),
    "attention.scale": (),
    "logit_scale": (),
    "embedding_scale": (),
    "residual_scale": (),
}


class GgufFile:
    """A GGUF file's metadata and tensors; nothing is dequantised before `read`."""

    def __init__(self, path: Path):
        """Raises HypenetError for a file that is no GGUF file or is cut short."""
        self.path = path
        with path.open("rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                raise HypenetError(f"{path} is no GGUF file; give one, or a Hugging Face directory")
        try:
            self._reader = gguf.GGUFReader(path)
        # What the reader trips over in a damaged file depends on where the damage is.
        except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
            raise HypenetError(f"{path} is not a whole GGUF file ({error}); copy it again") from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        # GGUF lists a shape from the fastest dimension to the slowest.
        self.shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in self._tensors.items()}

    def metadata(self, key: str) -> Any:
        """The value of a key (a Python number, string or list), or None."""
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except (ValueError, IndexError) as error:
            raise HypenetError(f"the key {key} of {self.path} cannot be read ({error}); copy the file again") from error

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32; raises HypenetError for a quantisation that cannot be undone."""
        tensor = self._tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise HypenetError(
                f"tensor {name} of {self.path} is quantised as {tensor.tensor_type.name}, which cannot be undone; "
                "use another quantisation"
            ) from error
        return values.reshape(self.shapes[name])


def read(
    path: Path, dtype: np.dtype, place: Place | None = None
) -> tuple[ModelConfig, dict[str, Any], Tokenizer | None]:
    """(config, parameters, tokenizer or None) of a GGUF file.

    Raises:
      HypenetError: a damaged file, an unsupported architecture, setting or quantisation, tensors that do not belong
        to the metadata, or a tokenizer that cannot be rebuilt.
    """
    file, config, tokenizer = opened(path)
    return config, params.build(gguf_names.tensors(config), file.read, dtype, place), tokenizer


def opened(path: Path) -> tuple[GgufFile, ModelConfig, Tokenizer | None]:
    """The file, its config and its tokenizer, no tensor read yet; raises HypenetError as `read` does."""
    file = GgufFile(path)
    config = read_config(file)
    shapes = {name: shape for name, shape in file.shapes.items() if name != _ROPE_FREQUENCIES}
    params.check_stored(gguf_names.tensors(config), shapes, str(path))
    return file, config, read_tokenizer(file.metadata, str(path))


def read_config(file: GgufFile) -> ModelConfig:
    """The metadata as a ModelConfig; raises HypenetError for an unsupported architecture or setting."""
    where = str(file.path)
    family = file.metadata("general.architecture")
    if family not in ARCHITECTURES:
        raise HypenetError(
            f"{where} names the architecture {family!r}, which is not supported; use one of {', '.join(ARCHITECTURES)}"
        )
    _refuse_unsupported(file, family)
    heads = _required(file, f"{family}.attention.head_count")
    hidden = _required(file, f"{family}.embedding_length")
    layers = _required(file, f"{family}.block_count")
    width = file.metadata(f"{family}.attention.key_length") or hidden // max(heads, 1)
    _check_widths(file, family, width)
    theta = _shortest(file.metadata(f"{family}.rope.freq_base") or 10000.0)
    scaling = None
    if _ROPE_FREQUENCIES in file.shapes:
        scaling = recover_scaling(file.read(_ROPE_FREQUENCIES), theta, where)
    return ModelConfig(
        vocab_size=_vocabulary(file),
        hidden_size=hidden,
        intermediate_size=_required(file, f"{family}.feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_optional(file, f"{family}.attention.head_count_kv", heads),
        head_dim=width,
        mixers=("attention",) * layers,
        family=family,
        tie_embeddings=gguf_names.HEAD.name not in file.shapes,
        qk_norm=family == "qwen3",
        norm_eps=_shortest(file.metadata(f"{family}.attention.layer_norm_rms_epsilon") or 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_rope=True,
        max_position=_required(file, f"{family}.context_length"),
        bos_id=first_id(file.metadata),
        eos_ids=end_ids(file.metadata),
        pad_id=file.metadata("tokenizer.ggml.padding_token_id"),
    )


def _vocabulary(file: GgufFile) -> int:
    # The embedding decides: vocab_size is optional, and the token list may be shorter than the table.
    name = gguf_names.MODEL[0].name
    if name not in file.shapes:
        raise HypenetError(f"{file.path} lacks the tensor {name}; convert the file again")
    return file.shapes[name][0]


def _refuse_unsupported(file: GgufFile, family: str) -> None:
    for key, harmless in _UNSUPPORTED.items():
        value = file.metadata(f"{family}.{key}")
        if value is not None and value not in harmless:
            wanted = repr(harmless[0]) if harmless else "absent"
            raise HypenetError(
                f"{family}.{key} of {file.path} is {value!r}, which is not supported; it must be {wanted}"
            )
    pieces = file.metadata("split.count")
    if pieces is not None and pieces > 1:
        raise HypenetError(f"{file.path} is one of {pieces} pieces; merge them into one GGUF file first")


def _check_widths(file: GgufFile, family: str, width: int) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        value = file.metadata(f"{family}.{key}")
        if value is not None and value != width:
            raise HypenetError(f"{family}.{key} of {file.path} is {value}; it must be the head width, {width}")


def _required(file: GgufFile, key: str) -> int:
    if file.metadata(key) is None:
        raise HypenetError(f"{file.path} lacks the key {key!r}; convert the file again")
    return _optional(file, key, 0)


def _optional(file: GgufFile, key: str, default: int) -> int:
    value = file.metadata(key)
    if value is None:
        return default
    # A key may hold one number, or one a layer.
    listed = value if isinstance(value, list) else [value]
    if not listed or any(entry != listed[0] for entry in listed):
        raise HypenetError(f"{key} of {file.path} differs between layers, which is not supported; all must be equal")
    return int(listed[0])


def _shortest(value: float) -> float:
    """The number that was meant by a float32: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
