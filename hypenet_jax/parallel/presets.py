"""A mesh for every machine that we know: what `mesh` of a config may name instead of giving sizes."""

from __future__ import annotations

from hypenet_jax.errors import HypenetError

# Machine -> mesh sizes; they multiply to its chips. "v5p-N" has N cores, two a chip; "v5e-N" and "v6e-N" have N chips.
# fsdp first: it costs no memory and overlaps with compute. At most 32 of it, which divides the rows of all of HALO's
# stages (32, 96 and 128); the rest is tensor.
PRESETS: dict[str, dict[str, int]] = {
    "cpu8": {"data": 2, "fsdp": 2, "tensor": 2},  # eight virtual devices: every axis takes part in a test
    "h100x8": {"fsdp": 8},
    "h200x2": {"fsdp": 2},
    "v5e-16": {"fsdp": 16},
    "v5e-256": {"fsdp": 32, "tensor": 8},
    "v5p-8": {"fsdp": 4},
    "v5p-16": {"fsdp": 8},
    "v5p-32": {"fsdp": 16},
    "v5p-64": {"fsdp": 32},
    "v5p-128": {"fsdp": 32, "tensor": 2},
    "v5p-256": {"fsdp": 32, "tensor": 4},
    "v5p-512": {"fsdp": 32, "tensor": 8},
    "v6e-64": {"fsdp": 32, "tensor": 2},
}


def preset(machine: str, slices: int = 1) -> dict[str, int]:
    """The mesh sizes of a machine, or of several slices of it joined by the data-center network.

    Raises:
      HypenetError: a machine that the table does not have.
    """
    if machine not in PRESETS:
        raise HypenetError(
            f"mesh {machine!r} is no machine we know; give sizes by axis, or one of {', '.join(PRESETS)}"
        )
    return ({"dcn": slices} if slices > 1 else {}) | PRESETS[machine]
