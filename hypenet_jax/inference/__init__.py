"""Running a model: chunked prefill, decoding on the device, sampling, batches of unequal prompts."""

from hypenet_jax.inference.generate import generate, stream
from hypenet_jax.inference.prefill import prefill
from hypenet_jax.inference.sampling import Sampling, prompt_seed, sample

__all__ = ["Sampling", "generate", "prefill", "prompt_seed", "sample", "stream"]
