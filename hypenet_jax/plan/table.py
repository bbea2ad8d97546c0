"""A plan in words: one paragraph a stage, and one line each for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

GIB, MIB = 2**30, 2**20
# Kinds and axes with less than this share of what is sent are left out.
SHOWN = 0.01


def in_units(number: float, unit: float) -> str:
    """The number in a unit: two decimals, or two digits of what is smaller than that shows."""
    return f"{number / unit:.2f}" if number == 0 or number >= 0.1 * unit else f"{number / unit:.2g}"


def describe(record: dict[str, Any]) -> str:
    """What a record says, over several lines."""
    lines = [f"  {record['stage']}: {_verdict(record)} (compiled in {record['compile_seconds']:.0f} s)"]
    parts = ", ".join(f"{name} {in_units(size, GIB)}" for name, size in record["parts_bytes"].items())
    if not record["fits"]:
        return "\n".join([*lines, f"    GiB a chip: {parts}", f"    what to change: {record['remedy']}"])
    rest = f"temporaries {in_units(record['temporary_bytes'], GIB)}, program {in_units(record['code_bytes'], GIB)}"
    lines.append(f"    GiB a chip: {parts}, {rest}")
    lines.append(
        f"    {in_units(record['flops'], 1e12)} TFLOP a chip; {record['traffic_bytes'] / GIB:.1f} GiB of memory traffic"
    )
    for (kind, axes), (count, sent) in _gathered(record["collectives"]):
        lines.append(f"    {kind} over {axes}: {sent / MIB:,.0f} MiB sent a chip by {count:,.0f} of them")
    if "seconds" in record:
        lines += _times(record)
    return "\n".join(lines)


def _verdict(record: dict[str, Any]) -> str:
    memory = record["memory_bytes"]
    of = f" of {memory / GIB:.2f} GiB" if memory else ""
    total = in_units(record.get("total_bytes", 0.0), GIB)
    if record["fits"]:
        return f"fits, {total}{of}" if memory else f"{total} GiB"
    return f"does not fit, by {record['short_bytes'] / GIB:.2f} GiB{of}"


def _gathered(found: Sequence[dict[str, Any]]) -> list[tuple[tuple[str, str], tuple[float, float]]]:
    """(kind, axes) -> (count, bytes sent), the largest first."""
    sums: dict[tuple[str, str], tuple[float, float]] = {}
    for one in found:
        key = one["kind"], "+".join(one["axes"])
        count, sent = sums.get(key, (0.0, 0.0))
        sums[key] = count + one["count"], sent + one["sent"]
    total = sum(sent for _, sent in sums.values())
    shown = [item for item in sums.items() if item[1][1] >= SHOWN * total]
    return sorted(shown, key=lambda item: -item[1][1])


def _times(record: dict[str, Any]) -> list[str]:
    seconds = record["seconds"]
    network = "".join(f", {axes} {s * 1e3:.3g}" for axes, s in seconds["network"].items())
    apart = f" ({seconds['apart'] * 1e3:.3g} apart from products)" if "apart" in seconds else ""
    least, most = record["step_seconds"]
    slow, fast = record["tokens_per_second"]
    lines = [
        f"    ms a step at peak rates: compute {seconds['compute'] * 1e3:.3g}, memory {seconds['memory'] * 1e3:.3g}"
        f"{apart}{network}; together {least * 1e3:.3g} (all at once) to {most * 1e3:.3g} (one by one)",
        f"    {slow:,.0f} to {fast:,.0f} tokens/s at those rates",
    ]
    if "chip_hours" in record:
        low, high = record["chip_hours"]
        lines.append(
            f"    the stage: {record['tokens'] / 1e9:.3g}B tokens in {record['steps']:,} steps, {low:,.3g} to "
            f"{high:,.3g} chip-hours"
        )
    return lines


COLUMNS = (
    "machine",
    "mesh",
    "stage",
    "GiB/chip",
    "of",
    "fits",
    "TFLOP",
    "sent MiB",
    "ms/step",
    "tokens/s",
    "compile s",
)


def rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table's cells, in the order of COLUMNS."""
    found = []
    for record in records:
        mesh = ",".join(f"{name}={size}" for name, size in record["mesh"].items() if size != 1)
        memory = f"{record['memory_bytes'] / GIB:.1f}" if record["memory_bytes"] else ""
        cells = [record["machine"], mesh, record["stage"]]
        if record["fits"]:
            sent = sum(one["sent"] for one in record["collectives"]) / MIB
            times = "{:.3g}-{:.3g}".format(*(s * 1e3 for s in record["step_seconds"])) if "seconds" in record else ""
            rate = "{:,.0f}-{:,.0f}".format(*record["tokens_per_second"]) if "seconds" in record else ""
            cells += [
                in_units(record["total_bytes"], GIB),
                memory,
                "yes",
                in_units(record["flops"], 1e12),
                f"{sent:,.0f}",
            ]
            cells += [times, rate]
        else:
            cells += [
                "",
                memory,
                f"no, {record['short_bytes'] / GIB:.2f} short",
                in_units(record["flops"], 1e12),
                "",
                "",
                "",
            ]
        found.append([*cells, f"{record['compile_seconds']:.0f}"])
    return found


def overview(records: Sequence[dict[str, Any]]) -> str:
    """One line a record, columns aligned."""
    return aligned([list(COLUMNS), *rows(records)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns as wide as their widest."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
