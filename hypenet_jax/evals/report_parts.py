"""Pieces of HTML that all pages are made of: the report's and the comparisons'."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hypenet_jax.evals.report_style import CSS


def document(title: str, mark: str, header: str, body: Sequence[str], footer: str) -> str:
    """A whole page that loads nothing from anywhere.

    `mark` is a <meta> element that says who wrote it; header and the parts of the body are HTML, title and footer text.
    """
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{mark}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n{header}\n"
        + "\n".join(part for part in body if part)
        + f"\n<footer>{escape(footer)}</footer>\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A section of the page under its heading; parts are HTML."""
    return f"<section>\n<h2>{escape(heading)}</h2>\n{''.join(parts)}\n</section>"


def missing(what: str, why: str) -> str:
    """A box that says what was not measured, and why."""
    return f'<p class="missing"><b>Not measured:</b> {escape(what)} ({escape(why)}).</p>'


def drawn(drawing: str, caption: str) -> str:
    """A figure: an inline SVG, and a caption where there is one."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{drawing}{below}</figure>"


def beside(*parts: str) -> str:
    """A figure with its small table to the right; one of them alone keeps its width."""
    return f'<div class="beside">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def card(label: str, value: str, note: str) -> str:
    """One number, large, under its label."""
    return (
        f'<div class="card"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="note">{escape(note)}</div></div>'
    )


def clock(seconds: float) -> str:
    """Seconds as a reader counts them."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def provenance(
    run: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None,
    seeds: Sequence[int] = (),
    facts: Mapping[str, str] | None = None,
    together: bool = True,
) -> str:
    """How the numbers of a page were made.

    run: run.json, {"command", "device", "versions", "seconds": {step: seconds}}, of which each may be missing; config:
    the settings, shown whole; facts: further rows, {label: text}. together: whether the steps' seconds add up, none
    being part of another.
    """
    run = run or {}
    parts = [f"<pre>{escape(str(run['command']))}</pre>"] if run.get("command") else []
    seconds = {step: t for step, t in (run.get("seconds") or {}).items() if t is not None}
    rows = {"Device": run.get("device")}
    rows["Versions"] = ", ".join(f"{name} {version}" for name, version in (run.get("versions") or {}).items())
    rows |= {f"Wall time, {step}": clock(t) for step, t in seconds.items()}
    if together and len(seconds) > 1:
        rows["Wall time, together"] = clock(sum(seconds.values()))
    rows["Seeds" if len(seeds) > 1 else "Seed"] = ", ".join(map(str, seeds))
    rows |= facts or {}
    body = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in rows.items() if v)
    if body:
        parts.append(f'<table class="facts"><tbody>{body}</tbody></table>')
    if not parts:
        parts.append(missing("command, versions and wall times", "run.json is not there"))
    if config:
        text = escape(json.dumps(config, indent=1, ensure_ascii=False))
        parts.append(f"<details><summary>The settings</summary><pre>{text}</pre></details>")
    return section("How this was made", *parts)
