"""Hugging Face directories and GGUF files in and out; nothing outside this package knows their names."""

from hypenet_jax.hub.loading import check, existing, load, read_config, tokenizer_of
from hypenet_jax.hub.saving import save

__all__ = ["check", "existing", "load", "read_config", "save", "tokenizer_of"]
