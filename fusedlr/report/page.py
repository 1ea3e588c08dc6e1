"""A report as one HTML file that loads nothing: drawings as SVG inside, words and tables as text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from fusedlr import __version__
from fusedlr.report.picture import panels, svg
from fusedlr.report.runs import Run
from fusedlr.report.tables import movers, summary
from fusedlr.report.terminal import NOTHING
from fusedlr.report.unusual import unusual

# readers' browsers are told to load nothing, whatever a name in the recording says
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="generator" content="fusedlr {version}">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --text: #1c1e21; --back: #ffffff; --line: #d0d4da; --mark: #fff4d6; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e4e6ea; --back: #16181c; --line: #3a3f47; --mark: #3a3013; }}
}}
body {{ margin: 0 auto; padding: 1rem 1.5rem 3rem; max-width: {width}rem; color: var(--text);
  background: var(--back); font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }} h3 {{ font-size: 1rem; }}
svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.15rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; }}
th:first-child, td:first-child {{ text-align: left; overflow-wrap: anywhere; }}
.runs {{ display: grid; gap: 0 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); }}
.scroll {{ overflow-x: auto; }}
.unusual li {{ background: var(--mark); padding: 0.3rem 0.6rem; margin: 0.3rem 0; }}
</style>
</head>
<body>
"""
# rem: a page of one run, and of two beside each other
_WIDTHS = {1: 70, 2: 110}


def page(runs: Sequence[Run]) -> str:
    """The whole file."""
    title = "fusedlr report: " + ", ".join(run.label for run in runs)
    parts = [_HEAD.format(version=__version__, title=escape(title), width=_WIDTHS[len(runs)])]
    parts += [f"<h1>{escape(title)}</h1>", _table(summary(runs))]
    parts += ["<h2>What is unusual</h2>", _beside([_unusual(run, len(runs) > 1) for run in runs])]
    for i, panel in enumerate(panels(runs)):
        # drawings of one page may not share the names of their parts
        drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>d{i}-", svg(panel, runs))
        drawing = drawing.replace("<svg ", f'<svg role="img" aria-label="{panel.title}" ', 1)
        parts += [f"<h2>{panel.title.capitalize()}</h2>", drawing]
    tables = [_movers(run, len(runs) > 1) for run in runs]
    if any(tables):
        parts += ["<h2>Tensors</h2>", _beside(tables)]
    return "\n".join([*parts, "</body>", "</html>", ""])


def _beside(blocks: Sequence[str]) -> str:
    return '<div class="runs">' + "".join(f"<div>{block}</div>" for block in blocks) + "</div>"


def _unusual(run: Run, several: bool) -> str:
    head = f"<h3>{escape(run.label)}</h3>" if several else ""
    sentences = [f"<li>{escape(one)}</li>" for one in unusual(run)]
    return head + (f'<ul class="unusual">{"".join(sentences)}</ul>' if sentences else f"<p>{NOTHING}</p>")


def _movers(run: Run, several: bool) -> str:
    of = f" in {run.label}" if several else ""
    return "".join(f"<h3>{escape(title + of)}</h3>{_table(rows)}" for title, rows in movers(run))


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [row(rows[0], "th"), *(row(cells, "td") for cells in rows[1:])]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
