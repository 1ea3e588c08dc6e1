"""The drawings of a report by matplotlib: a PNG of all of it, and parts as SVG for the page."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fusedlr.console import aligned
from fusedlr.report.layers import Heat, bounds, heat
from fusedlr.report.runs import Run, span
from fusedlr.report.tables import summary
from fusedlr.report.terminal import DECADE, beside, words
from fusedlr.schedule.curves import COLOURS

# inches: a figure of one run, and its panels
WIDTH, PANEL = 10.0, 2.6
# of a row in a heat map, and what title and axis take
ROW, FRAME = 0.15, 1.0
DPI = 110
# steps side by side in a heat map: as many as it has pixels
COLUMNS = 600
# letters of the words below the pictures, and the inches that a line of them takes
POINTS, LINE = 7, 0.145
# columns of the words in a figure of one run: a letter is 0.602 as wide as it is high, in whole pixels
LETTERS = int(0.96 * WIDTH * DPI / math.ceil(0.602 * POINTS * DPI / 72))
# the colour of letters and axes on the page, which `svg` has the page choose
_INK = "#010203"
_LIMIT, _SKIP = "#777777", "#d55e00"
_STYLE: Any = {
    # a name with dollar signs is no formula
    "text.parse_math": False,
    # the same runs give the same file
    "svg.hashsalt": "fusedlr",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": "small",
    "legend.frameon": False,
    "font.size": 9,
}
_ON_PAGE: Any = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}


# powers of ten as numbers: matplotlib writes them as formulas
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


@dataclass(frozen=True)
class Panel:
    """One kind of drawing, made for every run.

    Attributes:
        title: in words what is drawn.
        height: in inches.
        draw: draws one run into axes.
    """

    title: str
    height: float
    draw: Callable[[Run, Any], None]


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Rates, norms where there are any, and the heat map where tensors were recorded."""
    found = [Panel("learning rate", PANEL, _rates)]
    limits = span([line for run in runs for line in (*run.norms(), *run.limits())])
    if limits is not None:
        log = limits[1] > DECADE * limits[0]
        found.append(Panel("gradient norm", PANEL, lambda run, axes: _norms(run, axes, log)))
    heats = {run.label: heat(run.recording, COLUMNS) for run in runs}
    known = [one for one in heats.values() if one is not None]
    colours = bounds(known)
    if colours is not None:
        height = FRAME + ROW * max(len(one.labels) for one in known)
        found.append(
            Panel(
                "update over parameter", height, lambda run, axes: _heat(run, axes, heats[run.label], colours)
            )
        )
    return found


def png(runs: Sequence[Run]) -> bytes:
    """All panels, with the summary, the tensors and what is unusual in words below them."""
    several = len(runs) > 1
    each = [words(run, LETTERS, several) for run in runs]
    lines = [*aligned(summary(runs)), *beside(each, LETTERS)]
    with matplotlib.rc_context(_STYLE):
        drawn = panels(runs)
        heights = [*(panel.height for panel in drawn), LINE * len(lines)]
        figure = _figure(len(runs), sum(heights))
        parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
        for panel, part in zip(drawn, parts, strict=False):
            _draw(panel, runs, part)
        parts[-1].text(
            0.02, 1.0, "\n".join(lines), family="monospace", size=POINTS, va="top", linespacing=1.35
        )
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=DPI)
    return data.getvalue()


def svg(panel: Panel, runs: Sequence[Run]) -> str:
    """One panel for a page: letters and axes have the colour of the page's text."""
    with matplotlib.rc_context({**_STYLE, **_ON_PAGE}):
        figure = _figure(len(runs), panel.height)
        _draw(panel, runs, figure)
        data = io.StringIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
    text = data.getvalue()
    # what stands before is for a file of its own
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def _figure(columns: int, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw(panel: Panel, runs: Sequence[Run], figure: Any) -> None:
    """One panel for every run, with the same axis of values."""
    row = figure.subplots(1, len(runs), squeeze=False)[0]
    for run, axes in zip(runs, row, strict=True):
        panel.draw(run, axes)
        axes.set_title(f"{panel.title}, {run.label}" if len(runs) > 1 else panel.title, fontsize="medium")
        axes.set_xlabel("step")
    if panel.draw is _rates or panel.title == "gradient norm":
        low = min(axes.get_ylim()[0] for axes in row)
        high = max(axes.get_ylim()[1] for axes in row)
        for axes in row:
            axes.set_ylim(low, high)


def _rates(run: Run, axes: Any) -> None:
    for i, line in enumerate(run.rates()):
        axes.plot(run.steps, line.values, color=COLOURS[i % len(COLOURS)], linewidth=2.2, label=line.label)
    # the colour of the text stands out from the curves, on light and on dark
    style = {"color": matplotlib.rcParams["text.color"], "linewidth": 1, "linestyle": (0, (3, 3))}
    for i, line in enumerate(run.plans()):
        axes.plot(run.steps, line.values, label="planned" if i == 0 else None, **style)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.legend()


def _norms(run: Run, axes: Any, log: bool) -> None:
    for i, line in enumerate(run.norms()):
        color = COLOURS[i % len(COLOURS)]
        axes.plot(run.steps, line.values, color=color, linewidth=1, label=line.label or "norm")
    for i, line in enumerate(run.limits()):
        label = "limit" if i == 0 else None
        axes.plot(run.steps, line.values, color=_LIMIT, linewidth=1.2, linestyle="--", label=label)
    skipped = run.steps[run.skipped.any(1)]
    if len(skipped):
        top = axes.get_xaxis_transform()
        axes.plot(
            skipped, np.ones(len(skipped)), "v", color=_SKIP, transform=top, clip_on=False, label="skipped"
        )
    if log:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter(_PLAIN)
        low, high = axes.get_ylim()
        if high < DECADE**2 * low:
            # one power of ten alone says little
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter(_PLAIN)
        else:
            axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _heat(run: Run, axes: Any, rows: Heat | None, colours: tuple[float, float]) -> None:
    axes.grid(False)
    if rows is None:
        axes.text(0.5, 0.5, "no tensor was recorded", transform=axes.transAxes, ha="center")
        return
    edges = (run.steps[0] - 0.5, run.steps[-1] + 0.5, len(rows.labels) - 0.5, -0.5)
    image = axes.imshow(
        rows.values, norm=LogNorm(*colours), aspect="auto", interpolation="nearest", extent=edges
    )
    axes.set_yticks(range(len(rows.labels)), rows.labels, fontsize="x-small")
    axes.figure.colorbar(image, ax=axes, extend="both", pad=0.01, format=_PLAIN)
