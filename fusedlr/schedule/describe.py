"""A schedule in words: what its first, peak and last update get, and whether the usual advice holds.

`Schedule.describe` calls it. A schedule is here whatever has the attributes of `_Described`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Protocol

from fusedlr.schedule.changes import Change
from fusedlr.schedule.phases import Absolute, Phase

# warm-up shares that fine-tuning guides agree on
_USUAL_WARMUP = (0.05, 0.10)
# below this share of the peak the last update hardly moves the weights
_TINY_END = 0.01
# the highest rate is looked for at this many steps and at the ends of phases: enough to hit any wave's crest
_SAMPLES = 10_000


class _Described(Protocol):
    """What `describe` asks of a schedule; see `Schedule`."""

    @property
    def phases(self) -> tuple[Phase, ...]: ...

    @property
    def total_steps(self) -> int | None: ...

    @property
    def table(self) -> tuple[float, ...]: ...

    @property
    def changes(self) -> tuple[Change, ...]: ...

    def lr_at(self, k: int, peak: float = 1.0) -> float: ...

    def resolve(self, peak: float) -> _Described: ...


def describe(schedule: _Described, peak: float | None = None) -> str:
    """See `Schedule.describe`."""
    # without a peak, an absolute level counts as 0 of an infinite peak; the line on the last update names it
    known = schedule.resolve(math.inf if peak is None else peak)
    absolute = None if peak is not None else _absolute(schedule)
    total = schedule.total_steps
    warmup, top = warmup_steps(schedule), highest(known)

    def rate(k: int) -> str:
        share = f"{share_text(known.lr_at(k))} of the peak"
        return share if peak is None else f"{known.lr_at(k, peak):.4g} ({share})"

    lines = [f"{schedule!r}" if peak is None else f"{schedule!r}, peak {peak:g}"]
    lines.append(f"first update (k = 0): {rate(0)}")
    lines.append(f"highest update (k = {top:,}): {rate(top)}")
    lines += [
        f"{change.kind} from k = {change.k:,} on: from {rate(change.k)} to {share_text(change.to)} of the "
        f"peak, which update k = {change.k + change.steps:,} gets; {change.shape}"
        for change in schedule.changes
    ]
    if total is None:
        lines.append("no end: it is defined for any number of updates")
    elif absolute is not None:
        lines.append(
            f"last update (k = {total - 1:,}): on the way to {absolute.name}={absolute.lr:g}, "
            "an absolute rate; describe(peak=...) compares it with the peak"
        )
    else:
        lines.append(
            f"last update (k = {total - 1:,}): {rate(total - 1)}; past it (k = {total:,}): {rate(total)}"
        )
    lines.append(_warmup_line(warmup, total))
    if total is not None and warmup >= total and known.lr_at(top) < 1:
        lines.append("the warm-up is as long as the run: the peak is never reached")
    if total is not None and absolute is None:
        lines.append(_end_line(known.lr_at(total - 1) / max(known.lr_at(top), 1e-300)))
    return "\n".join(lines)


def share_text(ratio: float) -> str:
    """A ratio in per cent, as sentences give it."""
    return f"{100 * ratio:.3g} %"


def _absolute(schedule: _Described) -> Absolute | None:
    """The absolute level of a schedule, if it has one."""
    levels = (level for phase in schedule.phases for level in (phase.from_, phase.to))
    return next((level for level in levels if isinstance(level, Absolute)), None)


def warmup_steps(schedule: _Described) -> int:
    """Updates before the peak is first reached while the schedule rises from its first value."""
    first = schedule.phases[0]
    if first.shape == "table":
        begin = int(first.shape_param)
        values = schedule.table[begin : begin + first.end - first.origin + 1]
        top = values.index(max(values))
        return top if all(a <= b for a, b in pairwise(values[: top + 1])) else 0
    # an absolute level is a floor below the peak, so a first phase that has one falls
    if isinstance(first.from_, Absolute) or isinstance(first.to, Absolute) or first.from_ >= first.to:
        return 0
    return schedule.phases[1].begin if len(schedule.phases) > 1 else first.end


def highest(schedule: _Described) -> int:
    """The first of the updates that get the highest rate."""
    total = schedule.total_steps or schedule.phases[-1].end + 1
    steps = {*range(0, total, math.ceil(total / _SAMPLES))}
    steps.update(k for phase in schedule.phases for k in (phase.begin, phase.end) if k < total)
    if schedule.table:
        steps.add(schedule.table.index(max(schedule.table)))
    return max(sorted(steps), key=schedule.lr_at)


def _warmup_line(warmup: int, total: int | None) -> str:
    if warmup == 0:
        return "no warm-up: the first update already gets the full first value"
    if total is None:
        return f"warm-up: {warmup:,} updates"
    low, high = _USUAL_WARMUP
    share = warmup / total
    where = "within" if low <= share <= high else "shorter than" if share < low else "longer than"
    return (
        f"warm-up: {warmup:,} updates, {share_text(share)} of the run; {where} the usual "
        f"{max(1, round(low * total)):,} to {max(1, round(high * total)):,} updates ({low:.0%} to {high:.0%})"
    )


def _end_line(share: float) -> str:
    if share < _TINY_END:
        return (
            "the end point is the sensitive part: the last update gets less than 1 % of the peak; "
            "for a short run consider min_lr or min_lr_ratio"
        )
    return "the end point is the sensitive part: compare end values before comparing shapes"
