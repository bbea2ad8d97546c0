"""Linear attention with scalar decay: one fixed rate a head (Lightning), or one a token and head (simple GLA)."""

from kernels_pallas.lightning.api import lightning_attention, lightning_decode_step, simple_gla, slopes
from kernels_pallas.lightning.state import lightning_state

__all__ = ["lightning_attention", "lightning_decode_step", "lightning_state", "simple_gla", "slopes"]
