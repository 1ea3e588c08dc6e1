"""The value `Schedule`: its phases are checked, evaluated, resolved against a peak and written as numbers."""

from __future__ import annotations

import functools
import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fusedlr import arguments
from fusedlr.schedule.describe import describe
from fusedlr.schedule.phases import SHAPES, Absolute, Phase, evaluate

# shapes that divide or raise by their parameter
_SHAPES_WITH_PARAM = ("cosine", "restarts", "polynomial", "inverse_sqrt")


@dataclass(frozen=True)
class Call:
    """The call that built a schedule.

    Attributes:
        text: the call as a user would write it, without defaults.
        build: the constructor, to call again for another run length; None where no rule gives more steps.
        arguments: names and values that `build` was given.
        peak: the peak that absolute levels have been resolved against since.
    """

    text: str
    build: Callable[..., Schedule] | None = None
    arguments: tuple[tuple[str, Any], ...] = ()
    peak: float | None = None

    def __str__(self) -> str:
        return self.text if self.peak is None else f"{self.text}.resolve({self.peak!r})"


@dataclass(frozen=True)
class Schedule:
    """A learning rate schedule: phases in units of the peak, defined for every integer step.

    Build one with a constructor (`fusedlr.cosine(...)`, ...). Two schedules are equal when they give the same
    phases and run length, whatever they were called.

    Attributes:
        phases: at least one `Phase`, in the order of their `begin`.
        total_steps: updates in the run, or None where the schedule has no end.
        table: values that phases of shape `table` index, ratios of the peak.
        call: how it was built, for `repr` and `with_total_steps`; None if it was read from numbers.
    """

    phases: tuple[Phase, ...]
    total_steps: int | None = None
    table: tuple[float, ...] = ()
    call: Call | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check that the phases can be evaluated at every step."""
        if not self.phases:
            raise ValueError("phases=() is empty: a schedule needs at least one phase")
        begins = [phase.begin for phase in self.phases]
        if begins != sorted(set(begins)):
            raise ValueError(f"phases must begin one after the other, got begin={begins}")
        for phase in self.phases:
            arguments.choice("shape", phase.shape, SHAPES, show=str)
            if not phase.origin <= phase.begin <= phase.end or phase.end == phase.origin:
                raise ValueError(f"a phase needs origin <= begin <= end and origin < end, got {phase}")
            if phase.shape in _SHAPES_WITH_PARAM and not phase.shape_param > 0:
                raise ValueError(f"shape_param={phase.shape_param} must be above 0 in {phase}")
            for level in (phase.from_, phase.to):
                if not isinstance(level, Absolute) and not (math.isfinite(level) and level >= 0):
                    raise ValueError(f"a level must be a finite ratio of the peak >= 0, got {phase}")
            last = int(phase.shape_param) + phase.end - phase.origin
            if phase.shape == "table" and not 0 <= phase.shape_param <= last < len(self.table):
                raise ValueError(f"table has {len(self.table)} values, too few for {phase}")
        arguments.total_steps(self.total_steps)

    def __repr__(self) -> str:
        """The call that builds it; the values of a long table are left out."""
        if self.call is not None:
            return str(self.call)
        values = f", table={shown(self.table)}" if self.table else ""
        return f"Schedule(phases={self.phases!r}, total_steps={self.total_steps}{values})"

    def lr_at(self, k: int, peak: float = 1.0) -> float:
        """Learning rate of update `k`, counted from 0: the fp64 definition that every backend is held to.

        Args:
            k: step, any integer; before 0 the first value holds, past the end the last.
            peak: peak learning rate, the group's `initial_lr`. Absolute levels are resolved against it.

        Raises:
            ValueError: `k` is not an integer, `peak` is negative or not finite.

        >>> import fusedlr
        >>> fusedlr.cosine(warmup_steps=10, total_steps=110).lr_at(5, peak=2e-4)
        0.0001
        """
        # optimizers call this at every step: plain numbers in range skip the full checks
        if type(k) is not int:
            k = arguments.integer("k", k)
        if type(peak) is not float or not 0 <= peak < math.inf:
            peak = arguments.non_negative("peak", peak)
        phases = self.resolve(peak).phases
        # the last phase that has begun gives alone what `evaluate` gives for all of them
        i = max(bisect_right(self._begins, k), 1)
        return float(peak * evaluate(phases[i - 1 : i], k, self.table))

    @functools.cached_property
    def _begins(self) -> list[int]:
        return [phase.begin for phase in self.phases]

    @functools.cached_property
    def _is_absolute(self) -> bool:
        return any(isinstance(level, Absolute) for phase in self.phases for level in (phase.from_, phase.to))

    def resolve(self, peak: float) -> Schedule:
        """The same schedule with every absolute level turned into a ratio of `peak`.

        Raises:
            ValueError: a level is above `peak`.
        """
        if not self._is_absolute:
            return self

        def ratio(level: float | Absolute) -> float:
            return level.ratio(peak) if isinstance(level, Absolute) else level

        phases = tuple(replace(phase, from_=ratio(phase.from_), to=ratio(phase.to)) for phase in self.phases)
        return replace(self, phases=phases, call=self.call and replace(self.call, peak=float(peak)))

    def with_total_steps(self, total_steps: int) -> Schedule:
        """The same schedule for a run of another length: its constructor called with this `total_steps`.

        Warm-up given as a share is a share of the new length; the stable phase of `warmup_stable_decay`
        takes what is added. A schedule that knows no end, `constant()`, is returned as it is.

        Raises:
            ValueError: it is a table or comes from a file, so there is no rule for more steps, or the number
                is out of range.

        >>> import fusedlr
        >>> fusedlr.cosine(warmup_steps=10, total_steps=100).with_total_steps(200)
        cosine(warmup_steps=10, total_steps=200)
        """
        if self.call is None or self.call.build is None:
            raise ValueError(
                f"there is no rule by which {self!r} gets total_steps={total_steps}: build it anew"
            )
        if "total_steps" not in inspect.signature(self.call.build).parameters:
            return self
        given = {**dict(self.call.arguments), "total_steps": total_steps}
        # a stable phase of a given length would leave no room for the new steps
        given.pop("stable_steps", None)
        schedule = self.call.build(**given)
        return schedule if self.call.peak is None else schedule.resolve(self.call.peak)

    def describe(self, peak: float | None = None) -> str:
        """What the first, the peak and the last update get, in words.

        Args:
            peak: peak learning rate; without it rates are given as a share of the peak.
        """
        return describe(self, peak)

    def to_numbers(self) -> list[float]:
        """Plain numbers in a flat list, for checkpoints: number of phases, run length or -1, phases, table.

        Raises:
            ValueError: an absolute level has not been resolved.
        """
        rows: list[float] = [len(self.phases), -1 if self.total_steps is None else self.total_steps]
        for phase in self.phases:
            if isinstance(phase.from_, Absolute) or isinstance(phase.to, Absolute):
                raise ValueError(f"{self!r} has an absolute level: resolve(peak) it first")
            rows += [phase.begin, phase.end, phase.origin, phase.from_, phase.to]
            rows += [SHAPES.index(phase.shape), phase.shape_param]
        return [*rows, *self.table]

    @staticmethod
    def from_numbers(numbers: Sequence[float]) -> Schedule:
        """The schedule that `to_numbers` wrote; it no longer knows its call.

        Raises:
            ValueError: the list is not such a list.
        """
        try:
            count, total = int(numbers[0]), int(numbers[1])
            rows = [numbers[2 + 7 * i : 9 + 7 * i] for i in range(count)]
            phases = tuple(
                Phase(
                    int(begin), int(end), int(origin), float(f), float(to), SHAPES[int(shape)], float(param)
                )
                for begin, end, origin, f, to, shape, param in rows
            )
            table = tuple(float(value) for value in numbers[2 + 7 * count :])
        except (IndexError, TypeError, ValueError) as error:
            raise ValueError(f"not a schedule in numbers: {error} in {list(numbers)[:9]}...") from error
        return Schedule(phases, None if total < 0 else total, table)


def shown(values: Sequence[float]) -> str:
    """The values of a table, or how many there are if they would fill the screen."""
    return repr(values) if len(values) <= 8 else f"<{len(values)} values>"


def check_schedule(value: Any) -> None:
    """None or a `Schedule`, else TypeError."""
    if value is not None and not isinstance(value, Schedule):
        raise TypeError(
            f"schedule={value!r} is not a fusedlr.Schedule: build one with fusedlr.cosine(...), "
            "fusedlr.from_hf(...) or fusedlr.from_torch(...)"
        )
