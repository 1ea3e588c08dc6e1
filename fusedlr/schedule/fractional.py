"""Schedules of transformers with step counts that are fractions, such as a warm-up of 0.03 * 1,250 updates.

A schedule of ours counts whole steps. Here its shapes are read at every step of the run, between ends that
are fractions, and become tables; its levels stay. `from_hf` calls it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from fusedlr import arguments
from fusedlr.schedule.constructors import cosine_with_min_lr, table_length
from fusedlr.schedule.phases import Absolute, Phase, phase_weights
from fusedlr.schedule.schedule import Call, Schedule

# arguments of constructors that count steps
COUNTS = ("warmup_steps", "total_steps", "decay_steps", "stable_steps", "timescale")
# points over all counts of the grid on which constructors are called: any that keeps different ends apart
_POINTS = 2**46

_Level = float | Absolute


@dataclass(frozen=True)
class _Span:
    """A `Phase` whose ends may lie between steps, as `phase_weights` takes it."""

    begin: Fraction
    end: Fraction
    origin: Fraction
    from_: _Level
    to: _Level
    shape: str
    shape_param: float


def has_fractions(given: Mapping[str, Any]) -> bool:
    """Whether a count of steps among the arguments is a fraction, ValueError if one is no number."""
    counts = [arguments.real(name, given[name]) for name in COUNTS if given.get(name) is not None]
    return not all(map(float.is_integer, counts))


def build(constructor: Callable[..., Schedule], given: Mapping[str, Any], text: str) -> Schedule:
    """The schedule of a constructor whose step counts may be fractions, over the steps of the run.

    Args:
        constructor: the constructor, which takes whole numbers alone.
        given: its arguments.
        text: the call, for `repr`.

    Raises:
        ValueError: an argument is out of range, or the run has no end.
    """
    counts = {
        name: Fraction(arguments.non_negative(name, given[name]))
        for name in COUNTS
        if given.get(name) is not None
    }
    total = counts.get("total_steps")
    if total is not None:
        table_length("from_hf with fractions of steps", math.ceil(total))
    if "stable_steps" in counts and total is not None:
        length = sum(count for name, count in counts.items() if name != "total_steps")
        if length != total:
            warnings.warn(
                f"num_warmup_steps, num_stable_steps and num_decay_steps make {float(length):g} updates, not "
                f"num_training_steps={float(total):g}: num_stable_steps is used",
                # the warning points at the caller of from_hf
                stacklevel=3,
            )
        given = {**given, "total_steps": None}
        del counts["total_steps"]
    if constructor.__name__ == "cosine_warmup_with_min_lr":
        phases, table = _one_step_ahead(dict(given), counts)
    else:
        spans = _spans(constructor, given, counts)
        total = spans[-1].begin if total is None and "decay_steps" in counts else total
        phases, table = _at_steps(spans, total)
    return Schedule(tuple(phases), None if total is None else math.ceil(total), tuple(table), Call(text))


def _spans(
    constructor: Callable[..., Schedule], given: Mapping[str, Any], counts: Mapping[str, Fraction]
) -> list[_Span]:
    """The phases of the schedule, built on a fine grid, with their ends as they were given."""
    # at least one step long, so that the grid stays finer than any table
    points = _POINTS // max(1, math.ceil(sum(counts.values())))
    fine = {name: round(count * points) for name, count in counts.items()}
    warmup, total, decay, stable = (
        (fine.get(name, 0), counts.get(name, Fraction(0))) for name in COUNTS if name != "timescale"
    )
    # every place where a phase begins or ends
    sums = ((), (warmup,), (total,), (warmup, stable), (warmup, stable, decay))
    exact = {sum(a for a, _ in parts): sum((b for _, b in parts), Fraction(0)) for parts in sums}
    exact[total[0] - decay[0]] = total[1] - decay[1]
    timescale = float(counts.get("timescale") or counts.get("warmup_steps") or 10_000)

    def place(point: int) -> Fraction:
        return exact.get(point, Fraction(point, points))

    return [
        _Span(
            place(phase.begin),
            place(phase.end),
            place(phase.origin),
            phase.from_,
            phase.to,
            phase.shape,
            timescale if phase.shape == "inverse_sqrt" else phase.shape_param,
        )
        for phase in constructor(**{**given, **fine}).phases
    ]


def _at_steps(spans: list[_Span], total: Fraction | None) -> tuple[list[Phase], list[float]]:
    """The phases in whole steps, and their table."""
    phases: list[Phase] = []
    table: list[float] = []
    for i, span in enumerate(spans):
        begin = math.ceil(span.begin)
        last = i + 1 == len(spans)
        until = total if last else spans[i + 1].begin
        if not last and math.ceil(spans[i + 1].begin) == begin:
            # no step lies in it
            continue
        if span.shape == "constant":
            phases.append(Phase(begin, begin + 1, begin, span.from_, span.to, "constant"))
            continue
        if until is None:
            raise ValueError(
                "fractions of steps need num_training_steps here: there is no end to tabulate to"
            )
        end = max(math.ceil(until), begin + 1)
        if span.begin == 0 and _rises_straight(span):
            # it stays a straight line, which ends past the peak where the next phase begins
            slope = (span.to - span.from_) / float(span.end)  # type: ignore[operator]
            phases.append(Phase(0, end, 0, span.from_, span.from_ + slope * end, "linear"))  # type: ignore[operator]
            continue
        phases.append(Phase(begin, end, begin, span.from_, span.to, "table", len(table)))
        for k in range(begin, end + 1):
            e = min(max(Fraction(k), span.begin), span.end) - span.origin
            table.append(float(phase_weights(span, e, ())[1]))  # type: ignore[arg-type]
    return phases, table


def _rises_straight(span: _Span) -> bool:
    if span.shape != "linear" or isinstance(span.from_, Absolute) or isinstance(span.to, Absolute):
        return False
    return span.from_ < span.to


def _one_step_ahead(given: dict[str, Any], counts: Mapping[str, Fraction]) -> tuple[list[Phase], list[float]]:
    """`cosine_warmup_with_min_lr`: the fall of `cosine_with_min_lr` a step earlier, and a rise of its own."""
    first = given.pop("warmup_lr_rate", None)
    if "total_steps" not in counts:
        arguments.required_total_steps("cosine_warmup_with_min_lr", None)
    warmup, total = counts["warmup_steps"], counts["total_steps"]
    fall = _spans(cosine_with_min_lr, given, counts)[-1]
    earlier = _Span(
        warmup, max(fall.end - 1, warmup), warmup - 1, fall.from_, fall.to, fall.shape, fall.shape_param
    )
    phases, table = _at_steps([earlier], total)
    if warmup == 0:
        return phases, table
    if first is None:
        first = 1 / max(1.0, float(warmup))
        slope = first
    else:
        first = arguments.ratio("warmup_lr_rate", first)
        slope = (1 - first) / max(1.0, float(warmup - 1))
    begin = math.ceil(warmup)
    return [Phase(0, begin, 0, first, first + slope * begin, "linear"), *phases], table
