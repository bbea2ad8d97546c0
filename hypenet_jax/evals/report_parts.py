"""Pieces of HTML that all pages are made of: the report's and the comparisons'."""

from __future__ import annotations

import json
from collections.abc import Sequence
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


def provenance(found: dict[str, Any]) -> str:
    """How a run was made: its command, device, versions, wall times and config, from gathered data."""
    run, parts = found["run"] or {}, []
    if run.get("command"):
        parts.append(f"<pre>{escape(str(run['command']))}</pre>")
    rows = [["Device", escape(str(run["device"]))]] if run.get("device") else []
    versions = run.get("versions") or {}
    if versions:
        rows.append(["Versions", escape(", ".join(f"{k} {v}" for k, v in versions.items()))])
    seconds = {step: t for step, t in (run.get("seconds") or {}).items() if t is not None}
    rows += [[f"Wall time, {escape(step)}", clock(t)] for step, t in seconds.items()]
    rows += [["Wall time, together", clock(sum(seconds.values()))]] if seconds else []
    seed = (found["config"] or {}).get("seed")
    rows += [["Seed", str(seed)]] if seed is not None else []
    if rows:
        body = "".join(f"<tr><td>{left}</td><td>{right}</td></tr>" for left, right in rows)
        parts.append(f'<table class="facts"><tbody>{body}</tbody></table>')
    if not parts:
        parts.append(missing("command, versions and wall times", "run.json is not there"))
    if found["config"]:
        text = escape(json.dumps(found["config"], indent=1, ensure_ascii=False))
        parts.append(f"<details><summary>The whole config</summary><pre>{text}</pre></details>")
    return section("How this was made", *parts)
