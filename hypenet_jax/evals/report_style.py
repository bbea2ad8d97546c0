"""How the report looks: colours shared by plots and page (colour-blind safe), and the page's style sheet."""

from __future__ import annotations

from collections.abc import Iterable

INK = "#1c2430"
MUTED = "#667085"
RULE = "#e3e7ed"
ATTENTION = "#33476b"
LIGHTNING = "#f2c14e"

MODEL_COLOURS = {"teacher": "#5a7fa8", "student": "#d55e00", "student_unscaled": "#e2a72e", "model": "#d55e00"}
MODEL_NAMES = {"teacher": "Teacher", "student": "Student", "student_unscaled": "Student, unscaled", "model": "Model"}
OTHER_COLOURS = ("#009e73", "#a05195", "#56b4e9", "#6b6b6b", "#7a5c1e", "#e377a2", "#2f4b7c", "#8fb339")
FONT = "Inter, 'Helvetica Neue', Helvetica, 'Liberation Sans', Arial, sans-serif"


def model_colours(names: Iterable[str]) -> dict[str, str]:
    """The colour that each of these models has in every plot: its own, or the next of the others' by name."""
    others = sorted({*names} - MODEL_COLOURS.keys())
    return MODEL_COLOURS | {name: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, name in enumerate(others)}


def model_name(name: str) -> str:
    """A model's name as readers see it."""
    return MODEL_NAMES.get(name, name)


CSS = """
:root { --ink: #1c2430; --muted: #667085; --rule: #e3e7ed; --wash: #f6f8fa; --accent: #d55e00; --teacher: #5a7fa8;
  --attention: #33476b; --lightning: #f2c14e; }
* { box-sizing: border-box; }
html { background: #eef1f5; }
body { margin: 0 auto; max-width: 1160px; padding: 56px 56px 72px; background: #fff; color: var(--ink);
  font: 15.5px/1.55 FONT; font-variant-numeric: tabular-nums; -webkit-font-smoothing: antialiased; }
header { border-bottom: 1px solid var(--rule); padding-bottom: 30px; margin-bottom: 12px; }
.eyebrow { margin: 0 0 6px; color: var(--accent); font-size: 12.5px; font-weight: 600; letter-spacing: .09em;
  text-transform: uppercase; }
h1 { margin: 0 0 10px; font-size: 33px; line-height: 1.18; font-weight: 650; letter-spacing: -.017em;
  overflow-wrap: anywhere; }
.lede { margin: 0; max-width: 100ch; color: #3d4757; font-size: 17px; }
h2 { margin: 50px 0 6px; font-size: 21px; font-weight: 640; letter-spacing: -.01em; break-after: avoid; }
h3 { margin: 26px 0 8px; font-size: 14.5px; font-weight: 620; break-after: avoid; }
p.about { margin: 0 0 16px; max-width: 110ch; color: var(--muted); font-size: 14.5px; break-after: avoid; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(225px, 1fr)); gap: 14px; margin: 26px 0 0; }
.card { padding: 15px 18px 14px; border: 1px solid var(--rule); border-top: 3px solid var(--accent);
  border-radius: 6px; break-inside: avoid; }
.card .label { color: var(--muted); font-size: 12.5px; line-height: 1.35; }
.card .value { margin: 3px 0 1px; font-size: 26px; line-height: 1.2; font-weight: 640; letter-spacing: -.015em; }
.card .note { color: var(--muted); font-size: 12.5px; line-height: 1.4; }
.missing { margin: 10px 0; padding: 13px 16px; border: 1px dashed #c6cdd8; border-radius: 6px; background: var(--wash);
  color: var(--muted); font-size: 14px; break-inside: avoid; }
.missing b { color: #4a5565; font-weight: 600; }
.strips { display: grid; grid-template-columns: max-content 1fr; gap: 10px 16px; align-items: center;
  margin: 18px 0 4px; }
.strips .who { font-size: 13.5px; font-weight: 600; }
.strip { display: flex; gap: 3px; }
.strip i { flex: 1 1 0; min-width: 0; height: 34px; border-radius: 3px; font: 600 10.5px/34px FONT; text-align: center;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.attention { background: var(--attention); color: #fff; }
.lightning { background: var(--lightning); color: #5a4306; }
.other { background: #b9c3d0; color: #1c2430; }
.key { display: flex; gap: 20px; margin: 8px 0 0; color: var(--muted); font-size: 13px; }
.key span::before { content: ""; display: inline-block; width: 11px; height: 11px; margin-right: 7px;
  border-radius: 2px; background: var(--c); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
table { border-collapse: collapse; width: 100%; margin: 12px 0 4px; font-size: 14px; break-inside: avoid; }
th, td { padding: 7px 12px; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: baseline; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
thead th { border-bottom: 1.5px solid #aab4c2; color: var(--muted); font-size: 12.5px; font-weight: 600; }
tbody th { font-weight: 500; }
tr.group td, tr.group th { border-top: 1.5px solid #c9d1dc; }
td small { display: block; color: var(--muted); font-size: 11.5px; line-height: 1.3; }
td.cell { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.dot { display: inline-block; width: 9px; height: 9px; margin-right: 8px; border-radius: 50%; background: var(--c); }
figure { margin: 12px 0 6px; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: 4px; color: var(--muted); font-size: 13.2px; line-height: 1.45; }
.columns { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 26px; align-items: start; }
.columns figure, .columns .missing { margin-top: 4px; }
.beside { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 1fr); gap: 30px; align-items: center; }
.narrow { max-width: 700px; }
.sample { margin: 14px 0; padding: 14px 18px; border-left: 3px solid var(--c); background: var(--wash);
  border-radius: 0 6px 6px 0; break-inside: avoid; }
.sample .who { color: var(--c); font-size: 12.5px; font-weight: 650; }
.sample p { margin: 5px 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.55 Georgia, 'Liberation Serif', serif; }
.sample .prompt { color: var(--muted); }
code, pre { font: 12.8px/1.5 'SFMono-Regular', Menlo, Consolas, 'Liberation Mono', monospace; }
pre { margin: 8px 0; padding: 13px 16px; background: var(--wash); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
details summary { cursor: pointer; color: var(--muted); font-size: 14px; }
.facts td { text-align: left; overflow-wrap: anywhere; }
.facts td:first-child { width: 27%; color: var(--muted); }
footer { margin-top: 54px; padding-top: 14px; border-top: 1px solid var(--rule); color: var(--muted);
  font-size: 12.8px; }
@media screen and (max-width: 800px) { body { padding: 28px 20px; } .columns, .beside { grid-template-columns: 1fr; } }
@media print { html { background: #fff; } body { max-width: none; padding: 0; font-size: 11pt; }
  h2 { margin-top: 28px; } .cards { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  @page { margin: 16mm 14mm; } }
""".replace("FONT", FONT)
