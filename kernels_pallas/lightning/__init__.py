"""Lightning Attention: linear attention with one fixed decay a head."""

from kernels_pallas.lightning.api import lightning_attention, lightning_decode_step, slopes

__all__ = ["lightning_attention", "lightning_decode_step", "slopes"]
