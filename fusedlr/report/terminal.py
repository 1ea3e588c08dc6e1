"""A report as lines of a terminal, two runs beside each other."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from fusedlr.chart import MARKS, Scale, chart
from fusedlr.console import aligned
from fusedlr.report.layers import Heat, bounds, heat
from fusedlr.report.runs import Line, Run, span
from fusedlr.report.tables import movers, summary
from fusedlr.report.unusual import unusual

# what is planned, the limit and skipped steps have marks that no group has
PLANNED, LIMIT, SKIPPED = ".", "-", "!"
# from little to much; a blank is a layer that did not move
SHADES = ".:-=+*#%@"
# columns between two runs
GAP = 3
# rows of a heat map: A and B of 16 layers, and of more layers several in a row
ROWS = 32
# a range above this is drawn in powers
DECADE = 10.0
NOTHING = (
    "nothing of what is looked for: rates, limits, warm-up, norms, skips, tensors and layers are as usual"
)


def text(runs: Sequence[Run], width: int, height: int) -> list[str]:
    """The report of one run or two, at most `width` wide but for names of tensors."""
    each = (width - GAP * (len(runs) - 1)) // len(runs)
    lines = [*aligned(summary(runs))]
    heats = [heat(run.recording, each) for run in runs]
    limits = bounds([one for one in heats if one is not None])
    for draw in (_rates, _norms):
        lines += ["", *beside([draw(run, runs, each, height) for run in runs], each)]
    if limits is not None:
        maps = [_heat(run, heat_of, each, limits) for run, heat_of in zip(runs, heats, strict=True)]
        lines += ["", *beside(maps, each)]
    for run in runs:
        lines += words(run, width, len(runs) > 1)
    return lines


def words(run: Run, width: int, several: bool) -> list[str]:
    """The tables of tensors, and what is unusual; `several` runs are told apart by their labels."""
    of = f" in {run.label}" if several else ""
    lines = []
    for title, rows in movers(run):
        lines += ["", f"{title}{of}:", *aligned(rows)]
    lines += ["", f"unusual{of}:"]
    for sentence in unusual(run) or [NOTHING]:
        lines += textwrap.wrap(sentence, width, initial_indent="- ", subsequent_indent="  ")
    return lines


def beside(blocks: Sequence[list[str]], width: int) -> list[str]:
    """The lines of several blocks next to each other, each `width` wide.

    >>> beside([["a", "b"], ["c"]], 2)
    ['a    c', 'b']
    """
    rows = zip_longest(*blocks, fillvalue="")
    return [(" " * GAP).join(cell[:width].ljust(width) for cell in row).rstrip() for row in rows]


def _points(run: Run, values: Any) -> list[tuple[float, float]]:
    kept = np.isfinite(values)
    return list(zip(run.steps[kept].tolist(), values[kept].tolist(), strict=True))


def _scale(run: Run, limits: tuple[float, float], log: bool) -> Scale:
    low, high = limits
    return Scale(
        int(run.steps[0]), int(run.steps[-1]), low if log else 0.0, high if high > low else 2 * low, log
    )


def _end(run: Run) -> str:
    return f"step {run.steps[-1]:,}"


def _legend(marks: Sequence[tuple[str, str]], width: int) -> list[str]:
    return textwrap.wrap("   ".join(f"{mark} {label}" for mark, label in marks), width)


def _rates(run: Run, runs: Sequence[Run], width: int, height: int) -> list[str]:
    """The rates in front of what was planned."""
    lines = [line for one in runs for line in (*one.rates(), *one.plans())]
    limits = span(lines) or (0.0, 1.0)
    used = list(zip(MARKS, run.rates(), strict=False))
    curves = [(mark, _points(run, np.clip(line.values, 0, None))) for mark, line in used]
    curves += [(PLANNED, _points(run, line.values)) for line in run.plans()]
    legend = [*((mark, line.label) for mark, line in used), (PLANNED, "planned")]
    drawn = chart(curves, _scale(run, (0.0, limits[1]), False), width, height, _end(run))
    return [f"learning rate, {run.label}", *drawn, *_legend(legend, width)]


def _norms(run: Run, runs: Sequence[Run], width: int, height: int) -> list[str]:
    """The norms in front of their limits, and the skipped steps above them."""
    limits = span([line for one in runs for line in (*one.norms(), *one.limits())])
    if limits is None or not run.norms():
        return [f"gradient norm, {run.label}: none was measured"]
    log = limits[1] > DECADE * limits[0]
    used = list(zip(MARKS, run.norms(), strict=False))
    # powers have no place for 0
    floor = limits[0] if log else 0.0

    def inside(line: Line) -> list[tuple[float, float]]:
        return _points(run, np.clip(line.values, floor, None))

    skipped = [(SKIPPED, [(float(step), limits[1])]) for step in run.steps[run.skipped.any(1)].tolist()]
    curves = [*skipped, *((LIMIT, inside(line)) for line in run.limits())]
    curves += [(mark, inside(line)) for mark, line in used]
    legend = [(mark, line.label or "norm") for mark, line in used]
    legend += [(LIMIT, "limit")] * bool(run.limits()) + [(SKIPPED, "skipped")] * bool(skipped)
    drawn = chart(curves, _scale(run, limits, log), width, height, _end(run))
    return [f"gradient norm, {run.label}", *drawn, *_legend(legend, width)]


def _heat(run: Run, whole: Heat | None, width: int, limits: tuple[float, float]) -> list[str]:
    """Rows of shades, one for each layer and matrix."""
    if whole is None:
        return [f"update over parameter, {run.label}: no tensor was recorded"]
    margin = min(max(map(len, whole.merged(ROWS).labels)), width // 3)
    rows = heat(run.recording, width - margin - 2)
    assert rows is not None
    rows = rows.merged(ROWS)
    low, high = np.log(limits)
    with np.errstate(invalid="ignore"):
        places = (np.log(rows.values) - low) / (high - low) * (len(SHADES) - 1)
    lines = [f"update over parameter, {run.label}: layers and steps"]
    for label, row in zip(rows.labels, places, strict=True):
        shades = "".join(
            " " if np.isnan(place) else SHADES[round(min(max(place, 0), len(SHADES) - 1))] for place in row
        )
        lines.append(f"{label[-margin:]:>{margin}} |{shades}".rstrip())
    return [*lines, f"{SHADES[0]} {limits[0]:.2g} or less   {SHADES[-1]} {limits[1]:.2g} or more"]
