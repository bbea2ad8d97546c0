"""What the network is: config, layers, mixers, the stack, and the model that users hold."""

from hypenet_jax.model.config import LightningConfig, LogitsScaling, ModelConfig, RopeScaling
from hypenet_jax.model.language_model import LanguageModel

__all__ = ["LanguageModel", "LightningConfig", "LogitsScaling", "ModelConfig", "RopeScaling"]
