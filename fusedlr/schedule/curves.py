"""Schedules as curves, in a terminal and in a picture: for `fusedlr plot` and docs/make_pictures.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from fusedlr.chart import MARKS, Scale, chart
from fusedlr.schedule.schedule import Schedule

# points of a curve: more than a picture has columns; the ends of phases are added to them
_POINTS = 2_000
# points of a table, whose values may jump anywhere; drawing them takes a tenth of a second
_TABLE_POINTS = 100_000
# up to this many updates, each gets a dot
_FEW = 20
# updates that are drawn if no schedule of a picture has an end
_ENDLESS = 1_000
# Okabe and Ito: colours that stay apart for colour-blind readers
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#777777")
# in inches and dots per inch: a picture fits a page, and its letters are readable at half that size
WIDTH, HEIGHT, DPI = 8.0, 3.6, 120


def length(schedules: Mapping[str, Schedule]) -> int:
    """How many updates to draw: the longest run."""
    return max((schedule.total_steps or 0 for schedule in schedules.values()), default=0) or _ENDLESS


def steps(schedule: Schedule, total: int, first: int = 0) -> list[int]:
    """The steps from `first` to `total` to draw: evenly spaced, and both sides of every edge."""
    # a table may jump between any two values, so it gets more points
    points = _TABLE_POINTS if schedule.table else _POINTS
    chosen = {*range(first, total, math.ceil((total - first) / points)), total - 1, total}
    for phase in schedule.phases:
        chosen |= {k for k in (phase.begin - 1, phase.begin, phase.end) if first <= k <= total}
        if phase.shape == "restarts":
            # each restart is a jump back to the peak: both updates around it are drawn
            n, cycles = phase.end - phase.begin, int(phase.shape_param)
            edges = (phase.begin - (-n * i // cycles) for i in range(1, min(cycles, _POINTS)))
            chosen |= {k for edge in edges for k in (edge - 1, edge) if first <= k <= total}
    return sorted(chosen)


def text(schedules: Mapping[str, Schedule], peak: float, width: int = 80, height: int = 15) -> list[str]:
    """Lines of a terminal with all curves; where they meet, the first is in front."""
    total = length(schedules)
    curves = {
        name: [(k, schedule.lr_at(k, peak)) for k in steps(schedule, total)]
        for name, schedule in schedules.items()
    }
    top = max(value for curve in curves.values() for _, value in curve) or 1.0
    drawn = list(zip(MARKS, curves.values(), strict=False))
    return chart(drawn, Scale(0, total, 0, top), width, height, f"update {total:,}")


def picture(
    schedules: Mapping[str, Schedule],
    peak: float | None,
    path: Path,
    *,
    title: str = "",
    window: tuple[int, int] | None = None,
) -> None:
    """Write all curves to `path`, by its suffix a PNG or an SVG; needs matplotlib.

    Args:
        schedules: name in the legend -> schedule.
        peak: peak learning rate; None draws shares of it.
        path: the file, replaced if it is there.
        title: a line above.
        window: first and last step to draw, by default the whole of the longest run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first, last = window or (0, length(schedules))
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, schedule) in enumerate(schedules.items()):
        drawn = steps(schedule, last, first)
        rates = [schedule.lr_at(k, 1.0 if peak is None else peak) for k in drawn]
        # later curves are thinner, so that a curve beneath stays visible
        axes.plot(
            drawn,
            rates,
            color=COLOURS[i % len(COLOURS)],
            linewidth=max(1.2, 3.0 - 0.6 * i),
            marker="o" if len(drawn) <= _FEW else "",
            label=name,
        )
    if window is None:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("update k")
    axes.set_ylabel("share of the peak" if peak is None else "learning rate")
    if peak is not None:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small")
    _save(figure, path)


def _save(figure: object, path: Path) -> None:
    import matplotlib

    vector = path.suffix.lower() == ".svg"
    # without a date and random names the same curves give the same file
    with matplotlib.rc_context({"svg.hashsalt": "fusedlr"}):
        figure.savefig(path, metadata={"Date": None} if vector else None)  # type: ignore[attr-defined]
