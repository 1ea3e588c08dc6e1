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
from fusedlr.schedule.changes import COLUMNS as CHANGE_COLUMNS
from fusedlr.schedule.changes import Change, changed_phases
from fusedlr.schedule.describe import describe
from fusedlr.schedule.phases import SHAPES, Absolute, Phase, evaluate

# what `to_numbers` writes of every phase, in this order
_COLUMNS = ("begin", "end", "origin", "from_", "to", "shape", "shape_param")


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
        changes: what has become of it since it began to run, in order; its phases are what they make of those
            of `original`.
    """

    phases: tuple[Phase, ...]
    total_steps: int | None = None
    table: tuple[float, ...] = ()
    call: Call | None = field(default=None, compare=False, repr=False)
    changes: tuple[Change, ...] = field(default=(), compare=False, repr=False)
    _before: Schedule | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check that the phases, each of which is checked already, make a schedule with the table."""
        phases = tuple(arguments.ordered("phases", self.phases))
        for i, phase in enumerate(phases):
            if not isinstance(phase, Phase):
                raise ValueError(f"phases[{i}]={arguments.shown(phase)} is not a fusedlr.Phase")
        if not phases:
            raise ValueError("phases=() is empty: a schedule needs at least one phase")
        begins = [phase.begin for phase in phases]
        if begins != sorted(set(begins)):
            raise ValueError(f"phases must begin one after the other, got begin={arguments.shown(begins)}")
        table = self.table
        # every copy of a schedule comes here, and a table may be long
        if not (type(table) is tuple and all(type(x) is float and 0 <= x < math.inf for x in table)):
            values = enumerate(arguments.ordered("table", table))
            table = tuple(arguments.non_negative(f"table[{i}]", value) for i, value in values)
        for phase in phases:
            if phase.shape == "table":
                _check_table(phase, table)
        object.__setattr__(self, "phases", phases)
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "total_steps", arguments.total_steps(self.total_steps))

    def __repr__(self) -> str:
        """The calls that build it; the values of a long table are left out."""
        if self.changes:
            return ".".join(map(str, (repr(self.original), *self.changes)))
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
            ValueError: a level is above `peak`, or `peak` is not a rate.
        """
        if not self._is_absolute:
            return self
        peak = arguments.real("peak", peak)

        def ratio(level: float | Absolute) -> float:
            return level.ratio(peak) if isinstance(level, Absolute) else level

        phases = tuple(replace(phase, from_=ratio(phase.from_), to=ratio(phase.to)) for phase in self.phases)
        return replace(self, phases=phases, call=self.call and replace(self.call, peak=float(peak)))

    @property
    def original(self) -> Schedule:
        """The schedule as it was before the first of its `changes`; itself where there are none."""
        return self if self._before is None else self._before

    def cooldown(self, k: int, steps: int, shape: str = "1-sqrt", to: float = 0.0) -> Schedule:
        """The same schedule until update `k`, whose rate then falls to `to` and stays there.

        Update `k + i` gets `to + (r - to)*w(i/steps)`, where `r` is the rate that update `k` would have had,
        `w(0) = 1` and `w(1) = 0`: `w(x)` is `1 - x`, `cos(pi*x/2)**2` or `1 - sqrt(x)` (arXiv:2405.18392).
        The run ends with it, after `k + steps` updates. `optimizer.cooldown` does it to a run.

        Args:
            k: the first update of the cooldown, counted from 0.
            steps: updates in the cooldown, at least 1.
            shape: `linear`, `cosine` or `1-sqrt`.
            to: ratio of the peak.

        Raises:
            ValueError: an argument is out of range, or a level is absolute: `resolve(peak)` it first.

        >>> import fusedlr
        >>> schedule = fusedlr.constant().cooldown(k=100, steps=4, to=0.5)
        >>> [schedule.lr_at(k) for k in (99, 100, 101, 104)]
        [1.0, 1.0, 0.75, 0.5]
        >>> schedule
        constant().cooldown(k=100, steps=4, to=0.5)
        """
        return self._changed(Change("cooldown", k, steps, shape, to))

    def rewarm(self, k: int, steps: int, to: float = 1.0) -> Schedule:
        """The same schedule until update `k`, whose rate then goes straight to `to` and stays there.

        Args:
            k: the first update of the warm-up, counted from 0; it still gets the rate it would have had.
            steps: updates until `to` is reached, at least 1.
            to: ratio of the peak.

        Raises:
            ValueError: an argument is out of range, or a level is absolute: `resolve(peak)` it first.

        >>> import fusedlr
        >>> schedule = fusedlr.linear(total_steps=10).rewarm(k=5, steps=2)
        >>> [schedule.lr_at(k) for k in (4, 5, 6, 7, 100)]
        [0.6, 0.5, 0.75, 1.0, 1.0]
        """
        return self._changed(Change("rewarm", k, steps, "linear", to))

    def _changed(self, change: Change) -> Schedule:
        # where the run was put back to an earlier update, later changes have not happened
        return self.with_changes([*(c for c in self.changes if c.k < change.k), change])

    def with_changes(self, changes: Sequence[Change]) -> Schedule:
        """The original schedule after these changes instead of its own; without any it is the original.

        Raises:
            ValueError: their updates are not in order, or a level is absolute: `resolve(peak)` it first.
        """
        changes, original = tuple(changes), self.original
        if changes == self.changes:
            return self
        if not changes:
            return original
        original._check_ratios()
        steps = [change.k for change in changes]
        if steps != sorted(set(steps)):
            raise ValueError(f"changes must begin one after the other, got k={arguments.shown(steps)}")
        end, total = changes[-1].k + changes[-1].steps, original.total_steps
        if changes[-1].kind == "cooldown":
            total = end
        elif total is not None:
            # a rewarm-up does not end the run
            total = max(total, end)
        phases = changed_phases(original.phases, original.table, changes)
        return Schedule(phases, total, original.table, changes=changes, _before=original)

    def _check_ratios(self) -> None:
        """No level is absolute, else ValueError."""
        if self._is_absolute:
            raise ValueError(f"{self!r} has an absolute level: resolve(peak) it first")

    def with_total_steps(self, total_steps: int) -> Schedule:
        """The same schedule for a run of another length: its constructor called with this `total_steps`.

        Warm-up given as a share is a share of the new length; the stable phase of `warmup_stable_decay`
        takes what is added. A schedule that knows no end, `constant()`, is returned as it is.

        Raises:
            ValueError: it is a table or comes from a file, so there is no rule for more steps, its rate has
                been changed since it began, or the number is out of range.

        >>> import fusedlr
        >>> fusedlr.cosine(warmup_steps=10, total_steps=100).with_total_steps(200)
        cosine(warmup_steps=10, total_steps=200)
        """
        if self.changes:
            raise ValueError(
                f"{self!r} was changed while it ran and does not get total_steps={total_steps}: cancel the "
                "cooldown first"
            )
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

        Raises:
            ValueError: `peak` is negative or not finite.
        """
        return describe(self, None if peak is None else arguments.non_negative("peak", peak))

    def to_numbers(self) -> list[float]:
        """Plain numbers in a flat list, for checkpoints: number of phases, run length or -1, phases, table.

        Where there are changes: minus their number, the changes, and then the original in the same way.

        Raises:
            ValueError: an absolute level has not been resolved.
        """
        if self.changes:
            of_changes = [number for change in self.changes for number in change.to_numbers()]
            return [-len(self.changes), *of_changes, *self.original.to_numbers()]
        self._check_ratios()
        rows: list[float] = [len(self.phases), -1 if self.total_steps is None else self.total_steps]
        for phase in self.phases:
            rows += [phase.begin, phase.end, phase.origin, phase.from_, phase.to]  # type: ignore[list-item]
            rows += [SHAPES.index(phase.shape), phase.shape_param]
        return [*rows, *self.table]

    @staticmethod
    def from_numbers(numbers: Sequence[float]) -> Schedule:
        """The schedule that `to_numbers` wrote; it no longer knows its call.

        Every number is held to what the constructors accept: the list may come from a file of a stranger.

        Raises:
            ValueError: the list is not such a list; names the entry.
        """
        try:
            return _from_numbers(numbers)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"not a schedule in numbers: {error}") from error


def _from_numbers(numbers: Any) -> Schedule:
    """See `Schedule.from_numbers`: the list comes from a file and may say anything."""
    width = len(_COLUMNS)
    if not isinstance(numbers, (list, tuple)) or len(numbers) < 2 + width:
        raise ValueError(f"{arguments.shown(numbers)} is not a list of at least {2 + width} numbers")
    changes: list[Change] = []
    if arguments.integer("numbers[0], the number of phases,", numbers[0]) < 0:
        changes, numbers = _changes_from_numbers(numbers)
    # the list bounds the number of phases, whatever it says of it
    count = arguments.count("numbers[0], the number of phases,", numbers[0], 1, (len(numbers) - 2) // width)
    total = arguments.count("numbers[1], total_steps,", numbers[1], -1)
    phases = []
    for i in range(count):
        first = 2 + width * i
        row = dict(zip(_COLUMNS, numbers[first : first + width], strict=True))
        place = f"numbers[{first + _COLUMNS.index('shape')}], shape of phase {i},"
        row["shape"] = SHAPES[arguments.count(place, row["shape"], 0, len(SHAPES) - 1)]
        try:
            phases.append(Phase(**row))
        except ValueError as error:
            raise ValueError(f"numbers[{first}:{first + width}], phase {i}: {error}") from error
    schedule = Schedule(tuple(phases), None if total < 0 else total, tuple(numbers[2 + width * count :]))
    return schedule.with_changes(changes)


def _changes_from_numbers(numbers: Sequence[Any]) -> tuple[list[Change], Sequence[Any]]:
    """The changes that a list in numbers begins with, and what it says of the original schedule."""
    width, least = len(CHANGE_COLUMNS), 2 + len(_COLUMNS)
    most = (len(numbers) - 1 - least) // width
    count = arguments.count("-numbers[0], the number of changes,", -int(numbers[0]), 1, max(most, 0))
    changes = []
    for i in range(count):
        first = 1 + width * i
        try:
            changes.append(Change.from_numbers(numbers[first : first + width]))
        except ValueError as error:
            raise ValueError(f"numbers[{first}:{first + width}], change {i}: {error}") from error
    return changes, numbers[1 + width * count :]


def _check_table(phase: Phase, table: tuple[float, ...]) -> None:
    """The table has a value for every step of the phase, and none that gives a negative rate."""
    first = int(phase.shape_param)
    last = first + phase.end - phase.origin
    if not 0 <= first <= last < len(table):
        raise ValueError(f"table has {len(table)} values, too few for {phase}")
    # from_ + (to - from_)*w1 falls below 0 where from_ is the larger and w1 is above 1
    if phase.from_ == 0:
        return
    most = max(table[first : last + 1])
    levels = [level.lr if isinstance(level, Absolute) else level for level in (phase.from_, phase.to)]
    mixed = isinstance(phase.from_, Absolute) != isinstance(phase.to, Absolute)
    if most > 1 and (mixed or levels[0] + (levels[1] - levels[0]) * most < 0):
        raise ValueError(f"table has a value of {most}, which gives a negative rate in {phase}")


def shown(values: Sequence[float]) -> str:
    """The values of a table, or how many there are if they would fill the screen."""
    return repr(values) if len(values) <= 8 else f"<{len(values)} values>"


def check_schedule(value: Any) -> None:
    """None or a `Schedule`, else TypeError."""
    if value is not None and not isinstance(value, Schedule):
        raise TypeError(
            f"schedule={arguments.shown(value)} is not a fusedlr.Schedule: build one with "
            "fusedlr.cosine(...), fusedlr.from_hf(...) or fusedlr.from_torch(...)"
        )
