"""Curves as lines of text: for `fusedlr plot` through schedule/curves.py, and for `fusedlr report`.

Needs nothing but Python, and knows nothing of what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# the marks of curves, first curve first
MARKS = "*o+x#@%&"

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Scale:
    """What the edges of a drawing stand for.

    Attributes:
        left, right: x at the first and the last column.
        bottom, top: y at the last and the first row, above 0 where `log` is set.
        log: rows are powers, and no sums.
    """

    left: float
    right: float
    bottom: float
    top: float
    log: bool = False

    def column(self, x: float) -> float:
        """Where `x` is between the left edge, 0, and the right edge, 1."""
        return (x - self.left) / (self.right - self.left) if self.right > self.left else 0.0

    def row(self, y: float) -> float:
        """Where `y` is between the top, 0, and the bottom, 1."""
        if self.log:
            return (math.log(self.top) - math.log(y)) / (math.log(self.top) - math.log(self.bottom))
        return (self.top - y) / (self.top - self.bottom)

    def y(self, row: float) -> float:
        """What is drawn in a row between the top, 0, and the bottom, 1.

        >>> Scale(0, 1, 0.01, 1, log=True).y(0.5)
        0.1
        """
        if self.log:
            return float(f"{self.top ** (1 - row) * self.bottom**row:.12g}")
        # a bottom of 0 is exactly that
        return self.top * (1 - row) + self.bottom * row


def chart(curves: Sequence[tuple[str, Points]], scale: Scale, width: int, height: int, end: str) -> list[str]:
    """Lines of a terminal with all curves; where they meet, the first is in front.

    Args:
        curves: a mark, and the points that it joins, each inside the scale; a single point is a dot.
        scale: what the edges stand for.
        width, height: columns of the whole drawing and rows of the curves.
        end: what stands below the right edge.
    """
    middle = (height - 1) // 2
    labels = {i: f"{scale.y(i / (height - 1)):.3g}" for i in (0, middle, height - 1)}
    margin = max(4, *map(len, labels.values()))
    columns = width - margin - 2
    grid = [[" "] * columns for _ in range(height)]
    for mark, points in reversed(curves):
        places = [(scale.column(x) * (columns - 1), scale.row(y) * (height - 1)) for x, y in points]
        _trace(grid, places, mark)
    lines = [f"{labels.get(i, ''):>{margin}} |{''.join(row)}".rstrip() for i, row in enumerate(grid)]
    first = f"{scale.left:,g}"
    lines.append(" " * (margin + 1) + "+" + "-" * columns)
    lines.append(" " * (margin + 2) + first + end.rjust(columns - len(first)))
    return lines


def _trace(grid: list[list[str]], points: list[tuple[float, float]], mark: str) -> None:
    """Mark the polygon through `points` (column, row), one mark per column or row whichever is denser."""
    for x, y in points[:1]:
        grid[round(y)][round(x)] = mark
    for (x0, y0), (x1, y1) in pairwise(points):
        pieces = max(1, round(max(abs(x1 - x0), abs(y1 - y0))))
        for i in range(pieces + 1):
            x, y = x0 + (x1 - x0) * i / pieces, y0 + (y1 - y0) * i / pieces
            grid[round(y)][round(x)] = mark
