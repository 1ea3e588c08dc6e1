"""The definition of every learning rate schedule, in fp64.

A schedule is data: a tuple of phases in units of the peak learning rate, read by one evaluator. The
reference step evaluates it on device tensors with the same code; kernels spell `phase_weights` again under
the same names and are held to this file at every step.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import operator
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from numbers import Real
from typing import Any, ParamSpec

_P = ParamSpec("_P")

# a phase that never ends (inverse square root); far above any step count, exact in fp64
FOREVER = 2**53

# the order is part of the format of `Schedule.to_numbers`, and of the kernels' phase rows
SHAPES = (
    "constant",
    "linear",
    "cosine",
    "restarts",
    "polynomial",
    "inverse_sqrt",
    "1-sqrt",
    "1-sqrt-rise",
    "table",
)
_PARAM_SHAPES = ("cosine", "restarts", "polynomial", "inverse_sqrt")


@dataclass(frozen=True)
class Absolute:
    """A level given as a learning rate, not as a ratio of the peak; `name` is the argument it came from."""

    lr: float
    name: str = "min_lr"

    def ratio(self, peak: float) -> float:
        """`lr / peak`, in [0, 1]; ValueError otherwise."""
        if not peak > 0:
            raise ValueError(f"{self.name}={self.lr} is absolute and needs a peak lr above 0, got lr={peak}")
        if self.lr > peak:
            raise ValueError(f"{self.name}={self.lr} is above the peak lr={peak}")
        return self.lr / peak


@dataclass(frozen=True)
class Phase:
    """One piece of a schedule: `from_*w0 + to*w1` for steps `begin <= k`, until the next phase begins.

    Elapsed steps are `e = clamp(k, begin, end) - origin` out of `n = end - origin`, so a phase past its end
    holds its last value. `from_` and `to` are ratios of the peak. `shape` names the weights (see
    `phase_weights`), `shape_param` is its one number: cycles, power, time scale or position in the table.
    """

    begin: int
    end: int
    origin: int
    from_: float | Absolute
    to: float | Absolute
    shape: str
    shape_param: float = 0.0


class _Scalars:
    """The arithmetic of `phase_weights` on Python numbers; `fusedlr.reference` has the same on tensors."""

    sin, cos, sqrt = staticmethod(math.sin), staticmethod(math.cos), staticmethod(math.sqrt)
    real = staticmethod(float)

    @staticmethod
    def where(condition: bool, a: Any, b: Any) -> Any:
        return a if condition else b

    @staticmethod
    def clamp(x: int, low: int, high: int) -> int:
        return min(max(x, low), high)

    @staticmethod
    def take(values: Sequence[float], index: int) -> float:
        return values[index]


def phase_weights(phase: Phase, e: Any, table: Sequence[float], xp: Any = _Scalars) -> tuple[Any, Any]:
    """Weights `(w0, w1)` of `from_` and `to`, `w0 + w1 = 1`, after `e` of the phase's `n` steps.

    `e` is an integer, or an integer tensor when `xp` works on tensors. What is small is computed as itself,
    never as 1 minus something: `r = n - e` steps remain, and the cosine's angle is reduced in integers.
    """
    shape, c = phase.shape, phase.shape_param
    n = phase.end - phase.origin
    r = n - e
    if shape == "constant":
        return 1.0, 0.0
    if shape == "linear":
        return xp.real(r) / n, xp.real(e) / n
    if shape == "cosine" and not float(2 * c).is_integer():
        angle = math.pi * c * xp.real(e) / n
        return xp.cos(angle) ** 2, xp.sin(angle) ** 2
    if shape in ("cosine", "restarts"):
        # 0.5*(1 - cos(pi*x)) = sin(pi/2 * x)**2 has period 2 in x = q/n and is even around x = 1
        q = int(2 * c) * e % (2 * n) if shape == "cosine" else int(c) * e % n
        q = xp.where(q > n, 2 * n - q, q)
        quarter = 0.5 * math.pi / n
        return xp.sin(quarter * xp.real(n - q)) ** 2, xp.sin(quarter * xp.real(q)) ** 2
    if shape == "polynomial":
        w0 = (xp.real(r) / n) ** c
        return w0, 1.0 - w0
    if shape == "inverse_sqrt":
        w0 = 1.0 / xp.sqrt(1.0 + xp.real(e) / c)
        return w0, 1.0 - w0
    if shape == "1-sqrt":
        root = xp.sqrt(xp.real(e) / n)
        return xp.real(r) / n / (1.0 + root), root
    if shape == "1-sqrt-rise":
        root = xp.sqrt(xp.real(r) / n)
        return root, xp.real(e) / n / (1.0 + root)
    w1 = xp.take(table, int(c) + e)
    return 1.0 - w1, w1


def evaluate(phases: Sequence[Phase], k: Any, table: Sequence[float] = (), xp: Any = _Scalars) -> Any:
    """The ratio of the peak at step `k`: the value of the last phase begun. Every level must be a ratio."""
    value = None
    for phase in phases:
        e = xp.clamp(k, phase.begin, phase.end) - phase.origin
        w0, w1 = phase_weights(phase, e, table, xp)
        level = phase.from_ * w0 + phase.to * w1
        value = level if value is None else xp.where(k >= phase.begin, level, value)
    return value


@dataclass(frozen=True)
class Call:
    """The call of a constructor that built a schedule, to build it again for another run length."""

    constructor: str
    arguments: tuple[tuple[str, Any], ...]
    peak: float | None = None  # what absolute levels were resolved against


@dataclass(frozen=True)
class Schedule:
    """A learning rate schedule: phases in units of the peak, defined for every integer step.

    Build one with the constructors of this module (`fusedlr.cosine(...)`, ...). Two schedules are equal when
    they give the same phases and run length, whatever they were called.

    Attributes:
        phases: at least one `Phase`, in the order of their `begin`.
        total_steps: updates in the run, or None where the schedule has no end.
        table: values that phases of shape `table` index, ratios of the peak.
        label: how it was built, for `repr`.
        call: how it was built, for `with_total_steps`; None for tables and what was read from a file.
    """

    phases: tuple[Phase, ...]
    total_steps: int | None = None
    table: tuple[float, ...] = ()
    label: str = field(default="", compare=False)
    call: Call | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check that the phases can be evaluated at every step."""
        if not self.phases:
            raise ValueError("phases=() is empty: a schedule needs at least one phase")
        begins = [phase.begin for phase in self.phases]
        if begins != sorted(set(begins)):
            raise ValueError(f"phases must begin one after the other, got begin={begins}")
        for phase in self.phases:
            if phase.shape not in SHAPES:
                raise ValueError(f"shape={phase.shape!r} is unknown, expected one of {', '.join(SHAPES)}")
            if not phase.origin <= phase.begin <= phase.end or phase.end == phase.origin:
                raise ValueError(f"a phase needs origin <= begin <= end and origin < end, got {phase}")
            if phase.shape in _PARAM_SHAPES and not phase.shape_param > 0:
                raise ValueError(f"shape_param={phase.shape_param} must be above 0 in {phase}")
            for level in (phase.from_, phase.to):
                if not isinstance(level, Absolute) and not (math.isfinite(level) and level >= 0):
                    raise ValueError(f"a level must be a finite ratio of the peak >= 0, got {phase}")
            last = int(phase.shape_param) + phase.end - phase.origin
            if phase.shape == "table" and not 0 <= phase.shape_param <= last < len(self.table):
                raise ValueError(f"table has {len(self.table)} values, too few for {phase}")
        if self.total_steps is not None:
            _count("total_steps", self.total_steps, at_least=1)

    def __repr__(self) -> str:
        """The call that builds it; the values of a long table are left out."""
        if self.label:
            return self.label
        values = f", table={_shown(self.table)}" if self.table else ""
        return f"Schedule(phases={self.phases!r}, total_steps={self.total_steps}{values})"

    def lr_at(self, k: int, peak: float = 1.0) -> float:
        """Learning rate of update `k`, counted from 0: the fp64 definition that every backend is held to.

        Args:
            k: step, any integer; before 0 the first value holds, past the end the last.
            peak: peak learning rate, the group's `initial_lr`. Absolute levels are resolved against it.

        Raises:
            ValueError: `k` is not an integer, `peak` is negative or not finite.

        >>> cosine(warmup_steps=10, total_steps=110).lr_at(5, peak=2e-4)
        0.0001
        """
        # an optimizer asks at every step: plain numbers in range need no more than a look
        if type(k) is not int:
            k = _integer("k", k)
        if type(peak) is not float or not 0 <= peak < math.inf:
            peak = _non_negative("peak", peak)
        phases = self.resolve(peak).phases
        # the last phase that has begun; alone it gives what `evaluate` gives for all
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
        return replace(
            self,
            phases=phases,
            label=self.label and f"{self.label}.resolve({float(peak)!r})",
            call=self.call and replace(self.call, peak=peak),
        )

    def with_total_steps(self, total_steps: int) -> Schedule:
        """The same schedule for a run of another length: its constructor called with this `total_steps`.

        Warm-up given as a share is a share of the new length; the stable phase of `warmup_stable_decay`
        takes what is added. A schedule that knows no end, `constant()`, is returned as it is.

        Raises:
            ValueError: it is a table or comes from a file, so there is no rule for more steps, or the number
                is out of range.

        >>> cosine(warmup_steps=10, total_steps=100).with_total_steps(200)
        cosine(warmup_steps=10, total_steps=200)
        """
        if self.call is None:
            raise ValueError(
                f"there is no rule by which {self!r} gets total_steps={total_steps}: build it anew"
            )
        build = globals()[self.call.constructor]
        if "total_steps" not in inspect.signature(build).parameters:
            return self
        arguments = {**dict(self.call.arguments), "total_steps": total_steps}
        # given as well, it would leave no room for the new steps
        arguments.pop("stable_steps", None)
        schedule: Schedule = build(**arguments)
        return schedule if self.call.peak is None else schedule.resolve(self.call.peak)

    def describe(self, peak: float | None = None) -> str:
        """What the first, the peak and the last update get, in words.

        Args:
            peak: peak learning rate; without it rates are given as a share of the peak.
        """
        from fusedlr.describe import describe

        return describe(self, peak)

    def to_json(self) -> str:
        """A JSON object that `from_json` turns back into an equal schedule."""

        def plain(level: float | Absolute) -> Any:
            return {"lr": level.lr, "name": level.name} if isinstance(level, Absolute) else level

        phases = [
            {
                "begin": phase.begin,
                "end": phase.end,
                "origin": phase.origin,
                "from": plain(phase.from_),
                "to": plain(phase.to),
                "shape": phase.shape,
                "shape_param": phase.shape_param,
            }
            for phase in self.phases
        ]
        return json.dumps(
            {
                "label": self.label,
                "total_steps": self.total_steps,
                "phases": phases,
                "table": list(self.table),
            }
        )

    @staticmethod
    def from_json(text: str) -> Schedule:
        """The schedule that `to_json` wrote.

        Raises:
            ValueError: the text is not such an object.
        """

        def level(value: Any) -> float | Absolute:
            return Absolute(value["lr"], value["name"]) if isinstance(value, dict) else float(value)

        try:
            data = json.loads(text)
            phases = tuple(
                Phase(
                    int(row["begin"]),
                    int(row["end"]),
                    int(row["origin"]),
                    level(row["from"]),
                    level(row["to"]),
                    str(row["shape"]),
                    float(row["shape_param"]),
                )
                for row in data["phases"]
            )
            return Schedule(phases, data["total_steps"], tuple(map(float, data["table"])), str(data["label"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"text is not a schedule in JSON: {error!r} in {text[:80]!r}") from error

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
        """The schedule that `to_numbers` wrote; its label is lost.

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


# --- checks, each naming the argument and its value


def _integer(name: str, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is not an integer")
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} is not an integer") from None


def _count(name: str, value: Any, at_least: int = 0) -> int:
    count = _integer(name, value)
    if count < at_least:
        raise ValueError(f"{name}={value!r} must be at least {at_least}")
    return count


def _non_negative(name: str, value: Any) -> float:
    # float() would take these
    if isinstance(value, (bool, str)):
        raise ValueError(f"{name}={value!r} is not a number")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} is not a number") from None
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name}={value!r} must be a finite number >= 0")
    return number


def _positive(name: str, value: Any) -> float:
    number = _non_negative(name, value)
    if number == 0:
        raise ValueError(f"{name}={value!r} must be above 0")
    return number


def _ratio(name: str, value: Any) -> float:
    number = _non_negative(name, value)
    if number > 1:
        raise ValueError(f"{name}={value!r} must be a ratio in [0, 1]")
    return number


def _total(name: str, total_steps: Any) -> int:
    if total_steps is None:
        raise ValueError(f"{name} needs total_steps, the number of updates in the run")
    return _count("total_steps", total_steps, at_least=1)


def _optional_total(total_steps: Any) -> int | None:
    return None if total_steps is None else _count("total_steps", total_steps, at_least=1)


def _warmup(warmup_steps: Any, total_steps: int | None) -> int:
    """Warm-up in updates; below 1 it is a share of the run, rounded up as the HF Trainer does."""
    # 0 < True < 1 is False, so bools get their error below
    if isinstance(warmup_steps, Real) and 0 < float(warmup_steps) < 1:
        if total_steps is None:
            raise ValueError(f"warmup_steps={warmup_steps!r} is a ratio and needs total_steps")
        return math.ceil(total_steps * float(warmup_steps))
    return _count("warmup_steps", warmup_steps)


def _floor(min_lr_ratio: Any, min_lr: Any) -> float | Absolute:
    """The level a schedule ends at: 0, a ratio of the peak or an absolute learning rate."""
    if min_lr_ratio is not None and min_lr is not None:
        raise ValueError(f"min_lr_ratio={min_lr_ratio!r} and min_lr={min_lr!r} exclude each other")
    if min_lr is not None:
        return Absolute(_non_negative("min_lr", min_lr))
    return 0.0 if min_lr_ratio is None else _ratio("min_lr_ratio", min_lr_ratio)


def _required_floor(name: str, min_lr_ratio: Any, min_lr: Any) -> float | Absolute:
    if min_lr_ratio is None and min_lr is None:
        raise ValueError(f"{name} needs one of min_lr_ratio (min_lr_rate in transformers) and min_lr")
    return _floor(min_lr_ratio, min_lr)


def _choice(name: str, value: Any, choices: Iterable[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown, expected one of {', '.join(choices)}")
    return value


# --- parts of the constructors


def _labelled(build: Callable[_P, Schedule]) -> Callable[_P, Schedule]:
    """Note the call in what a constructor builds; its label is what a user would write: without defaults."""
    parameters = inspect.signature(build).parameters

    @functools.wraps(build)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> Schedule:
        schedule = build(*args, **kwargs)
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        # .item() turns numpy's and torch's numbers into Python's
        shown = [
            f"{name}={value.item() if hasattr(value, 'item') else value!r}"
            for name, value in given.items()
            if value != parameters[name].default
        ]
        return replace(
            schedule,
            label=f"{build.__name__}({', '.join(shown)})",
            call=Call(build.__name__, tuple(given.items())),
        )

    return call


def _shown(values: Sequence[float]) -> str:
    """The values of a table, or how many there are if they would fill the screen."""
    return repr(values) if len(values) <= 8 else f"<{len(values)} values>"


def _hold(begin: int, level: float | Absolute) -> Phase:
    return Phase(begin, begin + 1, begin, level, level, "constant")


def _rise(warmup: int, warmup_from: Any) -> list[Phase]:
    """Linear warm-up over `[0, warmup)`, or nothing."""
    first = _ratio("warmup_from", warmup_from)
    return [Phase(0, warmup, 0, first, 1.0, "linear")] if warmup else []


def _fall(warmup: int, total: int, floor: float | Absolute, shape: str, param: float = 0.0) -> Phase:
    """Decay from the peak to the floor over `[warmup, total)`, which then holds."""
    # with a warm-up as long as the run there is no decay left: past the end the floor holds
    return Phase(warmup, total, warmup, 1.0, floor, shape, param) if total > warmup else _hold(warmup, floor)


# --- constructors


@_labelled
def constant() -> Schedule:
    """The peak at every step: `f(k) = 1`.

    >>> constant().lr_at(1000, peak=2e-4)
    0.0002
    """
    return Schedule((_hold(0, 1.0),))


@_labelled
def constant_with_warmup(
    warmup_steps: float = 0, total_steps: int | None = None, *, warmup_from: float = 0.0
) -> Schedule:
    """Linear warm-up, then the peak: `f(k) = k/W` for `k < W`, then 1.

    Args:
        warmup_steps: `W` in updates; below 1 a share of `total_steps`.
        total_steps: updates in the run; only needed for a share, and to say where the run ends.
        warmup_from: ratio of the peak that update 0 gets.

    Raises:
        ValueError: an argument is out of range.

    >>> constant_with_warmup(warmup_steps=4).lr_at(1)
    0.25
    """
    total = _optional_total(total_steps)
    warmup = _warmup(warmup_steps, total)
    return Schedule((*_rise(warmup, warmup_from), _hold(warmup, 1.0)), total)


@_labelled
def linear(
    warmup_steps: float = 0,
    total_steps: int | None = None,
    *,
    min_lr_ratio: float | None = None,
    min_lr: float | None = None,
    warmup_from: float = 0.0,
) -> Schedule:
    """Linear warm-up to the peak, then linear decay: `f(k) = (T-k)/(T-W)` down to the floor.

    Args:
        warmup_steps: `W` in updates; below 1 a share of `total_steps`.
        total_steps: `T`, updates in the run.
        min_lr_ratio: floor as a ratio of the peak, default 0.
        min_lr: floor as a learning rate, instead of `min_lr_ratio`.
        warmup_from: ratio of the peak that update 0 gets.

    Raises:
        ValueError: an argument is out of range, `total_steps` is missing, or both floors are given.

    >>> linear(warmup_steps=2, total_steps=10).lr_at(6)
    0.5
    """
    total = _total("linear", total_steps)
    warmup = _warmup(warmup_steps, total)
    fall = _fall(warmup, total, _floor(min_lr_ratio, min_lr), "linear")
    return Schedule((*_rise(warmup, warmup_from), fall), total)


@_labelled
def cosine(
    warmup_steps: float = 0,
    total_steps: int | None = None,
    *,
    num_cycles: float = 0.5,
    min_lr_ratio: float | None = None,
    min_lr: float | None = None,
    warmup_from: float = 0.0,
) -> Schedule:
    """Linear warm-up to the peak, then half a cosine down to the floor.

    `f(k) = 0.5*(1 + cos(2*pi*num_cycles*p))` with `p = (k-W)/(T-W)` (Loshchilov and Hutter 2017,
    arXiv:1608.03983), scaled to end at the floor.

    Args:
        warmup_steps: `W` in updates; below 1 a share of `total_steps`.
        total_steps: `T`, updates in the run.
        num_cycles: waves over the decay; 0.5 falls once from the peak to the floor.
        min_lr_ratio: floor as a ratio of the peak, default 0.
        min_lr: floor as a learning rate, instead of `min_lr_ratio`.
        warmup_from: ratio of the peak that update 0 gets.

    Raises:
        ValueError: an argument is out of range, `total_steps` is missing, or both floors are given.

    >>> schedule = cosine(warmup_steps=200, total_steps=4000, min_lr_ratio=0.1)
    >>> [round(schedule.lr_at(k), 6) for k in (0, 100, 200, 2100, 4000)]
    [0.0, 0.5, 1.0, 0.55, 0.1]
    """
    total = _total("cosine", total_steps)
    warmup = _warmup(warmup_steps, total)
    cycles = _positive("num_cycles", num_cycles)
    fall = _fall(warmup, total, _floor(min_lr_ratio, min_lr), "cosine", cycles)
    return Schedule((*_rise(warmup, warmup_from), fall), total)


@_labelled
def cosine_with_restarts(
    warmup_steps: float = 0,
    total_steps: int | None = None,
    *,
    num_cycles: int = 1,
    cycle_mult: float = 1.0,
    min_lr_ratio: float | None = None,
    min_lr: float | None = None,
    warmup_from: float = 0.0,
) -> Schedule:
    """Linear warm-up, then `num_cycles` half cosines, each from the peak to the floor (arXiv:1608.03983).

    Args:
        warmup_steps: `W` in updates; below 1 a share of `total_steps`.
        total_steps: `T`, updates in the run.
        num_cycles: number of cycles, a whole number.
        cycle_mult: each cycle is this many times as long as the one before; cycles then begin on whole steps.
        min_lr_ratio: floor as a ratio of the peak, default 0.
        min_lr: floor as a learning rate, instead of `min_lr_ratio`.
        warmup_from: ratio of the peak that update 0 gets.

    Raises:
        ValueError: an argument is out of range, or with `cycle_mult` a cycle is shorter than one update.

    >>> [cosine_with_restarts(total_steps=8, num_cycles=2).lr_at(k) for k in (0, 4, 8)]
    [1.0, 1.0, 0.0]
    """
    total = _total("cosine_with_restarts", total_steps)
    warmup = _warmup(warmup_steps, total)
    cycles = _count("num_cycles", num_cycles, at_least=1)
    mult = _positive("cycle_mult", cycle_mult)
    floor = _floor(min_lr_ratio, min_lr)
    phases = _rise(warmup, warmup_from)
    span = total - warmup
    if span > 0 and mult == 1:
        phases.append(Phase(warmup, total, warmup, 1.0, floor, "restarts", cycles))
    elif span > 0:
        # lengths in units of the longest cycle, which cannot overflow
        longest = cycles - 1 if mult > 1 else 0
        ends = list(accumulate(mult ** (i - longest) for i in range(cycles)))
        edges = [warmup, *(warmup + round(span * end / ends[-1]) for end in ends)]
        if any(end <= begin for begin, end in pairwise(edges)):
            raise ValueError(
                f"num_cycles={num_cycles!r} with cycle_mult={cycle_mult!r} leaves a cycle without an update "
                f"in {span} steps"
            )
        phases += [Phase(begin, end, begin, 1.0, floor, "cosine", 0.5) for begin, end in pairwise(edges)]
    # a cycle's last value is the peak of the next one, so the end has a phase of its own
    phases.append(_hold(max(total, warmup), floor))
    return Schedule(tuple(phases), total)


@_labelled
def polynomial(
    warmup_steps: float = 0,
    total_steps: int | None = None,
    *,
    power: float = 1.0,
    lr_end: float = 1e-7,
    warmup_from: float = 0.0,
) -> Schedule:
    """Linear warm-up, then `((T-k)/(T-W))**power` from the peak down to `lr_end`.

    Args:
        warmup_steps: `W` in updates; below 1 a share of `total_steps`.
        total_steps: `T`, updates in the run.
        power: exponent, above 0.
        lr_end: learning rate at the end, absolute, at most the peak.
        warmup_from: ratio of the peak that update 0 gets.

    Raises:
        ValueError: an argument is out of range; `lr_end` above the peak is found when the peak is known.

    >>> polynomial(total_steps=10, power=2.0, lr_end=0.0).lr_at(5)
    0.25
    """
    total = _total("polynomial", total_steps)
    warmup = _warmup(warmup_steps, total)
    end = Absolute(_non_negative("lr_end", lr_end), "lr_end")
    fall = _fall(warmup, total, end, "polynomial", _positive("power", power))
    return Schedule((*_rise(warmup, warmup_from), fall), total)


@_labelled
def inverse_sqrt(
    warmup_steps: float = 0,
    total_steps: int | None = None,
    *,
    timescale: int | None = None,
    warmup_from: float = 0.0,
) -> Schedule:
    """Linear warm-up, then `1/sqrt(1 + (k-W)/timescale)`, without an end (arXiv:2106.04560).

    Args:
        warmup_steps: `W` in updates; below 1 a share of `total_steps`.
        total_steps: updates in the run; only needed for a share, and to say where the run ends.
        timescale: updates until the rate has fallen to `1/sqrt(2)`; default `W`, or 10,000 without warm-up.
        warmup_from: ratio of the peak that update 0 gets.

    Raises:
        ValueError: an argument is out of range.

    >>> inverse_sqrt(warmup_steps=100).lr_at(400)
    0.5
    """
    total = _optional_total(total_steps)
    warmup = _warmup(warmup_steps, total)
    scale = _count("timescale", timescale, at_least=1) if timescale is not None else warmup or 10_000
    fall = Phase(warmup, FOREVER, warmup, 1.0, 0.0, "inverse_sqrt", float(scale))
    return Schedule((*_rise(warmup, warmup_from), fall), total)


@_labelled
def cosine_with_min_lr(
    warmup_steps: float = 0,
    total_steps: int | None = None,
    *,
    min_lr_ratio: float | None = None,
    min_lr: float | None = None,
    num_cycles: float = 0.5,
    warmup_from: float = 0.0,
) -> Schedule:
    """`cosine` with a floor that must be given, as transformers' scheduler of this name.

    Args:
        warmup_steps: `W` in updates; below 1 a share of `total_steps`.
        total_steps: `T`, updates in the run.
        min_lr_ratio: floor as a ratio of the peak; transformers calls it `min_lr_rate`.
        min_lr: floor as a learning rate; exactly one of the two is required.
        num_cycles: waves over the decay.
        warmup_from: ratio of the peak that update 0 gets.

    Raises:
        ValueError: an argument is out of range, or not exactly one floor is given.

    >>> cosine_with_min_lr(total_steps=10, min_lr=1e-5).lr_at(10, peak=1e-4)
    1e-05
    """
    _required_floor("cosine_with_min_lr", min_lr_ratio, min_lr)
    return cosine(
        warmup_steps,
        _total("cosine_with_min_lr", total_steps),
        num_cycles=num_cycles,
        min_lr_ratio=min_lr_ratio,
        min_lr=min_lr,
        warmup_from=warmup_from,
    )


@_labelled
def cosine_warmup_with_min_lr(
    warmup_steps: float = 0,
    total_steps: int | None = None,
    *,
    min_lr_ratio: float | None = None,
    min_lr: float | None = None,
    warmup_lr_rate: float | None = None,
    num_cycles: float = 0.5,
) -> Schedule:
    """Cosine to a floor, one step ahead: no update gets 0, the peak is update W-1 and the floor update T-1.

    Args:
        warmup_steps: `W` in updates; below 1 a share of `total_steps`.
        total_steps: `T`, updates in the run.
        min_lr_ratio: floor as a ratio of the peak; transformers calls it `min_lr_rate`.
        min_lr: floor as a learning rate; exactly one of the two is required.
        warmup_lr_rate: ratio of the peak that update 0 gets, default `1/W`.
        num_cycles: waves over the decay.

    Raises:
        ValueError: an argument is out of range, or not exactly one floor is given.

    >>> cosine_warmup_with_min_lr(warmup_steps=4, total_steps=20, min_lr_ratio=0.1).lr_at(0)
    0.25
    """
    total = _total("cosine_warmup_with_min_lr", total_steps)
    warmup = _warmup(warmup_steps, total)
    floor = _required_floor("cosine_warmup_with_min_lr", min_lr_ratio, min_lr)
    cycles = _positive("num_cycles", num_cycles)
    first = None if warmup_lr_rate is None else _ratio("warmup_lr_rate", warmup_lr_rate)
    # everything happens one step early: the origins stand one step before the phases
    phases = []
    if warmup and first is None:
        phases.append(Phase(0, warmup - 1, -1, 0.0, 1.0, "linear"))
    elif warmup and first is not None:
        phases.append(Phase(0, max(warmup - 1, 1), 0, first, 1.0, "linear"))
    phases.append(Phase(warmup, max(total - 1, warmup), warmup - 1, 1.0, floor, "cosine", cycles))
    return Schedule(tuple(phases), total)


# the shapes of `warmup_stable_decay`'s types
_RISES = {"linear": "linear", "cosine": "cosine", "1-sqrt": "1-sqrt-rise"}
_FALLS = {"linear": "linear", "cosine": "cosine", "1-sqrt": "1-sqrt"}


@_labelled
def warmup_stable_decay(
    warmup_steps: float = 0,
    decay_steps: int | None = None,
    total_steps: int | None = None,
    *,
    stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Schedule:
    """Warm-up from the floor, a stable phase at the peak, decay back to the floor (arXiv:2404.06395).

    Args:
        warmup_steps: `W` in updates; below 1 a share of `total_steps`.
        decay_steps: updates in the decay, required.
        total_steps: updates in the run; default the sum of the three phases.
        stable_steps: updates at the peak; default what `total_steps` leaves. Given both, it wins.
        warmup_type: `linear`, `cosine` or `1-sqrt`.
        decay_type: `linear`, `cosine` or `1-sqrt` (arXiv:2405.18392).
        min_lr_ratio: floor as a ratio of the peak.
        num_cycles: waves over a cosine decay.

    Raises:
        ValueError: an argument is out of range, lengths are missing, or the stable phase would be negative.

    >>> schedule = warmup_stable_decay(warmup_steps=10, decay_steps=20, total_steps=100, decay_type="1-sqrt")
    >>> [schedule.lr_at(k) for k in (5, 50, 85, 100)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if decay_steps is None:
        raise ValueError("warmup_stable_decay needs decay_steps, the number of updates in the decay")
    decay = _count("decay_steps", decay_steps)
    total = _optional_total(total_steps)
    warmup = _warmup(warmup_steps, total)
    stable = _stable_steps(warmup, stable_steps, decay, total)
    floor = _ratio("min_lr_ratio", min_lr_ratio)
    cycles = _positive("num_cycles", num_cycles)
    rise = _RISES[_choice("warmup_type", warmup_type, _RISES)]
    fall = _FALLS[_choice("decay_type", decay_type, _FALLS)]
    begin, end = warmup + stable, warmup + stable + decay
    phases = []
    if warmup:
        phases.append(Phase(0, warmup, 0, floor, 1.0, rise, 0.5 if rise == "cosine" else 0.0))
    if stable:
        phases.append(_hold(warmup, 1.0))
    if decay:
        phases.append(Phase(begin, end, begin, 1.0, floor, fall, cycles if fall == "cosine" else 0.0))
    phases.append(_hold(end, floor))
    return Schedule(tuple(phases), total or end)


def _stable_steps(warmup: int, stable_steps: Any, decay: int, total: int | None) -> int:
    """Updates at the peak, as given or what the run leaves."""
    if stable_steps is None:
        if total is None:
            raise ValueError("warmup_stable_decay needs total_steps or stable_steps")
        if total < warmup + decay:
            raise ValueError(
                f"the stable phase would be negative: total_steps={total} is less than "
                f"warmup_steps={warmup} plus decay_steps={decay}"
            )
        return total - warmup - decay
    stable = _count("stable_steps", stable_steps)
    length = warmup + stable + decay
    if length == 0:
        raise ValueError("warmup_steps=0, stable_steps=0 and decay_steps=0 leave no update")
    if total is not None and length != total:
        warnings.warn(
            f"warmup_steps={warmup}, stable_steps={stable} and decay_steps={decay} make {length} updates, "
            f"not total_steps={total}: stable_steps is used",
            # past this function, the constructor and its label
            stacklevel=4,
        )
    return stable


def table(fn: Callable[[int], float] | Iterable[float], total_steps: int | None = None) -> Schedule:
    """Any schedule: `fn(k)` for `k = 0 ... total_steps-1`, computed once; the last value holds past the end.

    Args:
        fn: function from the step to a ratio of the peak, as `LambdaLR` takes; or the values themselves.
        total_steps: updates in the run, required for a function; for values, how many of them to use.

    Raises:
        ValueError: a value is negative or not finite, or `total_steps` is missing or more than the values.

    >>> table(lambda k: 0.9**k, total_steps=100).lr_at(2)
    0.81
    """
    if callable(fn):
        total = _total("table", total_steps)
        values = [fn(k) for k in range(total)]
    else:
        values = list(fn)
        total = len(values) if total_steps is None else _total("table", total_steps)
        if not 0 < total <= len(values):
            raise ValueError(f"total_steps={total_steps!r} needs that many values, got {len(values)}")
        values = values[:total]
    numbers = tuple(_non_negative(f"the value at step {k}", value) for k, value in enumerate(values))
    label = f"table({_shown(list(numbers))})"
    # a phase spans at least one step, so a table of one value is a constant
    if total == 1:
        return Schedule((_hold(0, numbers[0]),), 1, label=label)
    return Schedule((Phase(0, total - 1, 0, 0.0, 1.0, "table"),), total, numbers, label)


def total_steps(
    examples: int, batch_size: int, accumulation: int = 1, epochs: float = 1, world_size: int = 1
) -> int:
    """Updates in a run, counted as the Hugging Face Trainer does: the last, smaller batches count.

    Args:
        examples: training examples.
        batch_size: examples per device and micro-batch.
        accumulation: micro-batches per update.
        epochs: passes over the data, may be a fraction.
        world_size: data-parallel processes.

    Raises:
        ValueError: an argument is not positive.

    >>> total_steps(examples=10_000, batch_size=4, accumulation=8, epochs=3)
    939
    """
    batches = -(-_count("examples", examples, 1) // _count("batch_size", batch_size, 1))
    per_process = -(-batches // _count("world_size", world_size, 1))
    per_epoch = -(-per_process // _count("accumulation", accumulation, 1))
    return math.ceil(_positive("epochs", epochs) * per_epoch)
