"""A plan in words: one paragraph a stage, and one line each for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

GIB, MIB = 2**30, 2**20
# Kinds and axes with less than this share of what is sent are left out.
SHOWN = 0.01
LITTLE_ROOM = " with little room for what a run's own effort may add: plan with --full"


def in_units(number: float, unit: float) -> str:
    """The number in a unit: two decimals, or two digits of what is smaller than that shows."""
    return f"{number / unit:.2f}" if number == 0 or number >= 0.1 * unit else f"{number / unit:.2g}"


def describe(record: dict[str, Any]) -> str:
    """What a record says, over several lines; in one where it was not compiled."""
    if "refused" in record:
        return f"  {record['stage']}: not compiled: {record['refused']}"
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
        room = LITTLE_ROOM if record.get("little_room") else ""
        return f"fits{room}, {total}{of}" if memory else f"{total} GiB"
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
        lines.append(
            f"    the stage: {_tokens(record)} tokens in {record['steps']:,} steps, "
            f"{' to '.join(_hours(record))} chip-hours"
        )
    return lines


def _tokens(record: dict[str, Any]) -> str:
    return f"{record['tokens'] / 1e9:.3g}B"


def _hours(record: dict[str, Any]) -> list[str]:
    return [f"{hours:,.3g}" if hours < 1000 else f"{hours:,.0f}" for hours in record["chip_hours"]]


def totals(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens and chip-hours of the stages of training together, one record a machine and mesh.

    None for a single stage, nor where one of them does not fit: it would be the sum of a part.
    """
    found = []
    for cell in _by_cell(records):
        training = [record for record in cell if record["steps"]]
        if len(training) > 1 and all("chip_hours" in record for record in training):
            total = {name: training[0][name] for name in ("machine", "mesh")}
            total["stage"] = "+".join(record["stage"] for record in training)
            total["tokens"] = sum(record["tokens"] for record in training)
            total["chip_hours"] = [sum(ends) for ends in zip(*(r["chip_hours"] for r in training), strict=True)]
            found.append(total)
    return found


def describe_total(records: Sequence[dict[str, Any]]) -> str:
    """The totals in words, one line each; empty where there are none."""
    return "\n".join(
        f"  {total['stage']}: {_tokens(total)} tokens, {' to '.join(_hours(total))} chip-hours"
        for total in totals(records)
    )


def _by_cell(records: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Records of the same machine and mesh together, in the order in which they come."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        cells.setdefault((record["machine"], str(record["mesh"])), []).append(record)
    return list(cells.values())


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
    "tokens",
    "chip-hours",
    "compile s",
    "note",
)


def rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The table's cells, in the order of COLUMNS; after the stages of a machine and mesh their total."""
    lines = []
    for cell in _by_cell(records):
        for record in (*cell, *totals(cell)):
            line = _cells(record)
            lines.append([line.get(name, "") for name in COLUMNS])
    return lines


def _cells(record: dict[str, Any]) -> dict[str, str]:
    """The cells of a line that have something in them, by column."""
    mesh = ",".join(f"{name}={size}" for name, size in record["mesh"].items() if size != 1)
    cells = {"machine": record["machine"], "mesh": mesh, "stage": record["stage"]}
    if "chip_hours" in record:
        cells |= {"tokens": _tokens(record), "chip-hours": "-".join(_hours(record))}
    if "fits" not in record:
        return cells
    if record["memory_bytes"]:
        cells["of"] = f"{record['memory_bytes'] / GIB:.1f}"
    if "refused" in record:
        return cells | {"fits": "no", "note": record["refused"]}
    cells |= {"TFLOP": in_units(record["flops"], 1e12), "compile s": f"{record['compile_seconds']:.0f}"}
    if not record["fits"]:
        return cells | {"fits": f"no, {record['short_bytes'] / GIB:.2f} short"}
    sent = sum(one["sent"] for one in record["collectives"]) / MIB
    cells |= {"GiB/chip": in_units(record["total_bytes"], GIB), "fits": "yes", "sent MiB": f"{sent:,.0f}"}
    if record.get("little_room"):
        cells["note"] = "little room: --full"
    if "seconds" in record:
        cells["ms/step"] = "{:.3g}-{:.3g}".format(*(s * 1e3 for s in record["step_seconds"]))
        cells["tokens/s"] = "{:,.0f}-{:,.0f}".format(*record["tokens_per_second"])
    return cells


def overview(records: Sequence[dict[str, Any]]) -> str:
    """One line a record, columns aligned."""
    return aligned([list(COLUMNS), *rows(records)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns as wide as their widest."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
