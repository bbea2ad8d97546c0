"""A mesh for every machine that we know: what `mesh` of a config may name instead of giving sizes."""

from __future__ import annotations

import re

from hypenet_jax.errors import HypenetError

# At most so much of fsdp: it divides the rows of all of HALO's stages (32, 96 and 128).
MOST_FSDP = 32
# Chips of the slices that the Cloud offers, of v5e and v6e.
_SLICES = (4, 8, 16, 32, 64, 128, 256)
# TPU slices that the data-center network joins, at most.
MOST_SLICES = 64


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


def slices_of(machine: str) -> tuple[int, str]:
    """(2, "v5e-16") of "2xv5e-16", TPU slices joined by the data-center network; (1, machine) of every other name."""
    found = re.fullmatch(r"([0-9]{1,3})x((?:v5e|v5p|v6e)-[0-9]{1,6})", machine)
    return (int(found[1]), found[2]) if found and int(found[1]) in range(2, MOST_SLICES + 1) else (1, machine)


def preset(machine: str) -> dict[str, int]:
    """The mesh sizes of a machine, or of several TPU slices: "2xv5e-16".

    Raises:
      HypenetError: a machine that the table does not have.
    """
    slices, one = slices_of(machine)
    if one not in PRESETS:
        raise HypenetError(
            f"mesh {machine!r} is no machine we know; give sizes by axis, or one of {', '.join(PRESETS)}, or 2 to "
            f"{MOST_SLICES} slices of a TPU, such as 2xv5e-16"
        )
    return ({"dcn": slices} if slices > 1 else {}) | PRESETS[one]
