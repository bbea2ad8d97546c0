"""A mesh for every machine that we know: what `mesh` of a config may name instead of giving sizes."""

from __future__ import annotations

from hypenet_jax.errors import HypenetError

# At most so much of fsdp: it divides the rows of all of HALO's stages (32, 96 and 128).
MOST_FSDP = 32
# Chips of the slices that the Cloud offers, of v5e and v6e.
_SLICES = (4, 8, 16, 32, 64, 128, 256)


def spread(chips: int) -> dict[str, int]:
    """fsdp first, for it costs no memory and overlaps with compute; the rest is tensor."""
    fsdp = min(chips, MOST_FSDP)
    return {"fsdp": fsdp} | ({"tensor": chips // fsdp} if chips > fsdp else {})


# Machine -> mesh sizes; they multiply to its chips. "v5p-N" has N cores, two a chip; "v5e-N" and "v6e-N" have N chips.
PRESETS: dict[str, dict[str, int]] = {
    "cpu8": {"data": 2, "fsdp": 2, "tensor": 2},  # eight virtual devices: every axis takes part in a test
    "h100x8": {"fsdp": 8},
    "h200x2": {"fsdp": 2},
    **{f"v5e-{chips}": spread(chips) for chips in _SLICES},
    **{f"v5p-{2 * chips}": spread(chips) for chips in (*_SLICES, 512)},
    **{f"v6e-{chips}": spread(chips) for chips in _SLICES},
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
