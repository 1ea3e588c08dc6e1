"""The constructors of schedules: each turns its arguments into phases. A new schedule needs no more than one.

Arguments that most constructors share are documented once, in `SHARED`, and `constructor` puts them into the
docstrings. `W` is the length of the warm-up, `T` that of the run, both in updates; `k` counts updates from 0.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import accumulate, islice, pairwise
from typing import Any, ParamSpec

from fusedlr import arguments
from fusedlr.schedule.changes import FALLS
from fusedlr.schedule.phases import LAST_STEP, Absolute, Phase, fits_int64
from fusedlr.schedule.schedule import Call, Schedule, shown

_P = ParamSpec("_P")

# the end of a phase that never ends (inverse square root): no step count is above it
_FOREVER = LAST_STEP
# Cycles of growing length are a phase each, which kernels look through one after the other at every step.
_MOST_CYCLES = 2**16
# A table is kept in memory on the host and on every device: 128 MiB in fp64 at this length.
_LONGEST_TABLE = 2**24

# argument -> the line that documents it, for constructors whose own docstring does not
SHARED = {
    "warmup_steps": "`W` in updates; below 1 a share of `total_steps`.",
    "total_steps": "`T`, updates in the run.",
    "min_lr_ratio": "floor as a ratio of the peak, default 0.",
    "min_lr": "floor as a learning rate, instead of `min_lr_ratio`.",
    "warmup_from": "ratio of the peak that update 0 gets.",
}

# name -> constructor; `fusedlr` exports them all
CONSTRUCTORS: dict[str, Callable[..., Schedule]] = {}


def constructor(build: Callable[_P, Schedule]) -> Callable[_P, Schedule]:
    """Complete a constructor: list it, note the call in what it builds, and document the shared arguments.

    The noted call is what a user would write: without arguments that are at their default.
    """
    parameters = inspect.signature(build).parameters

    @functools.wraps(build)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> Schedule:
        schedule = build(*args, **kwargs)
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        given = {name: _plain(x) for name, x in given.items()}
        written = [f"{name}={value!r}" for name, value in given.items() if value != parameters[name].default]
        text = f"{build.__name__}({', '.join(written)})"
        return replace(schedule, call=Call(text, call, tuple(given.items())))

    call.__doc__ = _with_shared_arguments(build.__doc__, parameters)
    CONSTRUCTORS[build.__name__] = call
    return call


def _plain(value: Any) -> Any:
    """An argument as a literal: numbers of other types become Python's own. A tensor may be changed later."""
    if type(value) in (int, float):
        return value
    if not hasattr(value, "__float__"):
        return value
    number = float(value)
    return int(value) if number.is_integer() else number


def _with_shared_arguments(doc: str | None, parameters: Mapping[str, Any]) -> str | None:
    """A docstring that describes the shared arguments before those that only its constructor takes."""
    # Python run with -OO has no docstrings
    if doc is None:
        return None
    doc = inspect.cleandoc(doc)
    lines = "".join(
        f"    {name}: {SHARED[name]}\n"
        for name in parameters
        if name in SHARED and f"\n    {name}: " not in doc
    )
    if "\nArgs:\n" in doc:
        return doc.replace("\nArgs:\n", f"\nArgs:\n{lines}", 1)
    return doc.replace("\nRaises:\n", f"\nArgs:\n{lines}\nRaises:\n", 1) if lines else doc


def _lengths(name: str, warmup_steps: Any, total_steps: Any) -> tuple[int, int]:
    """Updates of warm-up and of the run for a constructor that needs to know where the run ends."""
    total = arguments.required_total_steps(name, total_steps)
    return arguments.warmup_steps(warmup_steps, total), total


def _floor(min_lr_ratio: Any, min_lr: Any, required_by: str = "") -> float | Absolute:
    """The level a schedule ends at: a ratio of the peak, an absolute rate, or 0 where neither is given.

    `required_by` names a constructor that must be given one of the two.
    """
    if required_by and min_lr_ratio is None and min_lr is None:
        raise ValueError(f"{required_by} needs one of min_lr_ratio (min_lr_rate in transformers) and min_lr")
    if min_lr_ratio is not None and min_lr is not None:
        both = f"min_lr_ratio={arguments.shown(min_lr_ratio)} and min_lr={arguments.shown(min_lr)}"
        raise ValueError(f"{both} exclude each other")
    if min_lr is not None:
        return Absolute(arguments.non_negative("min_lr", min_lr))
    return 0.0 if min_lr_ratio is None else arguments.ratio("min_lr_ratio", min_lr_ratio)


def _cycles(num_cycles: Any, steps: int, half_waves: int = 2) -> float:
    """Waves over the decay, few enough that kernels can count `half_waves` of each at every step."""
    cycles = arguments.positive("num_cycles", num_cycles)
    if not fits_int64(int(half_waves * cycles), max(steps, 1)):
        raise ValueError(
            f"num_cycles={arguments.shown(num_cycles)} is too large over {steps} steps: their product is "
            "counted in int64"
        )
    return cycles


def _hold(begin: int, level: float | Absolute) -> Phase:
    return Phase(begin, begin + 1, begin, level, level, "constant")


def _rise(warmup: int, warmup_from: Any) -> list[Phase]:
    """Linear warm-up over `[0, warmup)`, or nothing."""
    first = arguments.ratio("warmup_from", warmup_from)
    return [Phase(0, warmup, 0, first, 1.0, "linear")] if warmup else []


def _fall(warmup: int, total: int, floor: float | Absolute, shape: str, param: float = 0.0) -> Phase:
    """Decay from the peak to the floor over `[warmup, total)`, which then holds."""
    # a warm-up as long as the run leaves no decay: the floor holds from the end of the warm-up on
    return Phase(warmup, total, warmup, 1.0, floor, shape, param) if total > warmup else _hold(warmup, floor)


@constructor
def constant() -> Schedule:
    """The peak at every step: `f(k) = 1`.

    >>> constant().lr_at(1000, peak=2e-4)
    0.0002
    """
    return Schedule((_hold(0, 1.0),))


@constructor
def constant_with_warmup(
    warmup_steps: float = 0, total_steps: int | None = None, *, warmup_from: float = 0.0
) -> Schedule:
    """Linear warm-up, then the peak: `f(k) = k/W` for `k < W`, then 1.

    Args:
        total_steps: updates in the run; only needed for a share, and to say where the run ends.

    Raises:
        ValueError: an argument is out of range.

    >>> constant_with_warmup(warmup_steps=4).lr_at(1)
    0.25
    """
    total = arguments.total_steps(total_steps)
    warmup = arguments.warmup_steps(warmup_steps, total)
    return Schedule((*_rise(warmup, warmup_from), _hold(warmup, 1.0)), total)


@constructor
def linear(
    warmup_steps: float = 0,
    total_steps: int | None = None,
    *,
    min_lr_ratio: float | None = None,
    min_lr: float | None = None,
    warmup_from: float = 0.0,
) -> Schedule:
    """Linear warm-up to the peak, then linear decay: `f(k) = (T-k)/(T-W)` down to the floor.

    Raises:
        ValueError: an argument is out of range, `total_steps` is missing, or both floors are given.

    >>> linear(warmup_steps=2, total_steps=10).lr_at(6)
    0.5
    """
    warmup, total = _lengths("linear", warmup_steps, total_steps)
    fall = _fall(warmup, total, _floor(min_lr_ratio, min_lr), "linear")
    return Schedule((*_rise(warmup, warmup_from), fall), total)


@constructor
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
        num_cycles: waves over the decay; 0.5 falls once from the peak to the floor.

    Raises:
        ValueError: an argument is out of range, `total_steps` is missing, or both floors are given.

    >>> schedule = cosine(warmup_steps=200, total_steps=4000, min_lr_ratio=0.1)
    >>> [round(schedule.lr_at(k), 6) for k in (0, 100, 200, 2100, 4000)]
    [0.0, 0.5, 1.0, 0.55, 0.1]
    """
    warmup, total = _lengths("cosine", warmup_steps, total_steps)
    cycles = _cycles(num_cycles, total - warmup)
    fall = _fall(warmup, total, _floor(min_lr_ratio, min_lr), "cosine", cycles)
    return Schedule((*_rise(warmup, warmup_from), fall), total)


@constructor
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
        num_cycles: number of cycles, a whole number.
        cycle_mult: each cycle is this many times as long as the one before; cycles then begin on whole steps.

    Raises:
        ValueError: an argument is out of range, or with `cycle_mult` a cycle is shorter than one update.

    >>> [cosine_with_restarts(total_steps=8, num_cycles=2).lr_at(k) for k in (0, 4, 8)]
    [1.0, 1.0, 0.0]
    """
    warmup, total = _lengths("cosine_with_restarts", warmup_steps, total_steps)
    span = total - warmup
    cycles = arguments.count("num_cycles", num_cycles, at_least=1)
    _cycles(cycles, span, half_waves=1)
    mult = arguments.positive("cycle_mult", cycle_mult)
    floor = _floor(min_lr_ratio, min_lr)
    phases = _rise(warmup, warmup_from)
    if span > 0 and mult == 1:
        phases.append(Phase(warmup, total, warmup, 1.0, floor, "restarts", cycles))
    elif span > 0:
        if cycles > _MOST_CYCLES:
            raise ValueError(
                f"num_cycles={arguments.shown(num_cycles)} must be at most {_MOST_CYCLES} with "
                f"cycle_mult={arguments.shown(cycle_mult)}"
            )
        # lengths are in units of the longest cycle, so that no power of `mult` overflows
        longest = cycles - 1 if mult > 1 else 0
        ends = list(accumulate(mult ** (i - longest) for i in range(cycles)))
        edges = [warmup, *(warmup + round(span * end / ends[-1]) for end in ends)]
        if any(end <= begin for begin, end in pairwise(edges)):
            raise ValueError(
                f"num_cycles={arguments.shown(num_cycles)} with cycle_mult={arguments.shown(cycle_mult)} "
                f"leaves a cycle without an update in {span} steps"
            )
        phases += [Phase(begin, end, begin, 1.0, floor, "cosine", 0.5) for begin, end in pairwise(edges)]
    # at its end a cycle jumps to the next one's peak; the hold makes the last cycle end at the floor instead
    phases.append(_hold(max(total, warmup), floor))
    return Schedule(tuple(phases), total)


@constructor
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
        power: exponent, above 0.
        lr_end: learning rate at the end, absolute, at most the peak.

    Raises:
        ValueError: an argument is out of range; `lr_end` above the peak is found when the peak is known.

    >>> polynomial(total_steps=10, power=2.0, lr_end=0.0).lr_at(5)
    0.25
    """
    warmup, total = _lengths("polynomial", warmup_steps, total_steps)
    end = Absolute(arguments.non_negative("lr_end", lr_end), "lr_end")
    fall = _fall(warmup, total, end, "polynomial", arguments.positive("power", power))
    return Schedule((*_rise(warmup, warmup_from), fall), total)


@constructor
def inverse_sqrt(
    warmup_steps: float = 0,
    total_steps: int | None = None,
    *,
    timescale: int | None = None,
    warmup_from: float = 0.0,
) -> Schedule:
    """Linear warm-up, then `1/sqrt(1 + (k-W)/timescale)`, without an end (arXiv:2106.04560).

    Args:
        total_steps: updates in the run; only needed for a share, and to say where the run ends.
        timescale: updates until the rate has fallen to `1/sqrt(2)`; default `W`, or 10,000 without warm-up.

    Raises:
        ValueError: an argument is out of range.

    >>> inverse_sqrt(warmup_steps=100).lr_at(400)
    0.5
    """
    total = arguments.total_steps(total_steps)
    warmup = arguments.warmup_steps(warmup_steps, total)
    scale = arguments.count("timescale", timescale, at_least=1) if timescale is not None else warmup or 10_000
    fall = Phase(warmup, _FOREVER, warmup, 1.0, 0.0, "inverse_sqrt", float(scale))
    return Schedule((*_rise(warmup, warmup_from), fall), total)


@constructor
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
        min_lr_ratio: floor as a ratio of the peak; transformers calls it `min_lr_rate`.
        min_lr: floor as a learning rate; exactly one of the two is required.
        num_cycles: waves over the decay.

    Raises:
        ValueError: an argument is out of range, or not exactly one floor is given.

    >>> cosine_with_min_lr(total_steps=10, min_lr=1e-5).lr_at(10, peak=1e-4)
    1e-05
    """
    _floor(min_lr_ratio, min_lr, required_by="cosine_with_min_lr")
    return cosine(
        warmup_steps,
        arguments.required_total_steps("cosine_with_min_lr", total_steps),
        num_cycles=num_cycles,
        min_lr_ratio=min_lr_ratio,
        min_lr=min_lr,
        warmup_from=warmup_from,
    )


@constructor
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
        min_lr_ratio: floor as a ratio of the peak; transformers calls it `min_lr_rate`.
        min_lr: floor as a learning rate; exactly one of the two is required.
        warmup_lr_rate: ratio of the peak that update 0 gets, default `1/W`.
        num_cycles: waves over the decay.

    Raises:
        ValueError: an argument is out of range, or not exactly one floor is given.

    >>> cosine_warmup_with_min_lr(warmup_steps=4, total_steps=20, min_lr_ratio=0.1).lr_at(0)
    0.25
    """
    warmup, total = _lengths("cosine_warmup_with_min_lr", warmup_steps, total_steps)
    floor = _floor(min_lr_ratio, min_lr, required_by="cosine_warmup_with_min_lr")
    cycles = _cycles(num_cycles, total - warmup + 1)
    first = None if warmup_lr_rate is None else arguments.ratio("warmup_lr_rate", warmup_lr_rate)
    # update W-1 gets the peak and update T-1 the floor, so the phases count to their ends one step early
    phases = []
    if warmup and first is None:
        phases.append(Phase(0, warmup - 1, -1, 0.0, 1.0, "linear"))
    elif warmup and first is not None:
        phases.append(Phase(0, max(warmup - 1, 1), 0, first, 1.0, "linear"))
    phases.append(Phase(warmup, max(total - 1, warmup), warmup - 1, 1.0, floor, "cosine", cycles))
    return Schedule(tuple(phases), total)


# `warmup_type` of `warmup_stable_decay` -> the shape of the phase; `decay_type` is the shape
WARMUP_TYPES = {"linear": "linear", "cosine": "cosine", "1-sqrt": "1-sqrt-rise"}


@constructor
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
    decay = arguments.count("decay_steps", decay_steps)
    total = arguments.total_steps(total_steps)
    warmup = arguments.warmup_steps(warmup_steps, total)
    stable = _stable_steps(warmup, stable_steps, decay, total)
    floor = arguments.ratio("min_lr_ratio", min_lr_ratio)
    cycles = _cycles(num_cycles, decay)
    rise = WARMUP_TYPES[arguments.choice("warmup_type", warmup_type, WARMUP_TYPES, show=str)]
    fall = arguments.choice("decay_type", decay_type, FALLS, show=str)
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
        arguments.count("warmup_steps plus decay_steps", warmup + decay)
        if total is None:
            raise ValueError("warmup_stable_decay needs total_steps or stable_steps")
        if total < warmup + decay:
            raise ValueError(
                f"the stable phase would be negative: total_steps={total} is less than "
                f"warmup_steps={warmup} plus decay_steps={decay}"
            )
        return total - warmup - decay
    stable = arguments.count("stable_steps", stable_steps)
    length = arguments.count("warmup_steps plus stable_steps plus decay_steps", warmup + stable + decay)
    if length == 0:
        raise ValueError("warmup_steps=0, stable_steps=0 and decay_steps=0 leave no update")
    if total is not None and length != total:
        warnings.warn(
            f"warmup_steps={warmup}, stable_steps={stable} and decay_steps={decay} make {length} updates, "
            f"not total_steps={total}: stable_steps is used",
            # the warning points at the caller, past this function, the constructor and its wrapper
            stacklevel=4,
        )
    return stable


def table(fn: Callable[[int], float] | Iterable[float], total_steps: int | None = None) -> Schedule:
    """Any schedule: `fn(k)` for `k = 0 ... total_steps-1`, computed once; the last value holds past the end.

    Args:
        fn: function from the step to a ratio of the peak, as `LambdaLR` takes; or the values themselves.
        total_steps: updates in the run, required for a function; for values, how many of them to use.

    Raises:
        ValueError: `fn` is neither a function nor values in order, a value is negative or not finite, or
            `total_steps` is missing or more than the values.

    >>> table(lambda k: 0.9**k, total_steps=100).lr_at(2)
    0.81
    """
    if callable(fn):
        total = table_length("table", total_steps)
        values = [fn(k) for k in range(total)]
    else:
        ordered = arguments.ordered("fn", fn, "is neither a function of the step nor values in order")
        most = _LONGEST_TABLE + 1 if total_steps is None else table_length("table", total_steps)
        # an iterator may have no end
        values = list(islice(ordered, most))
        total = len(values) if total_steps is None else most
        if not 0 < total <= len(values):
            raise ValueError(f"total_steps={total_steps!r} needs that many values, got {len(values)}")
        table_length("table", total)
    numbers = tuple(arguments.non_negative(f"the value at step {k}", value) for k, value in enumerate(values))
    call = Call(f"table({shown(list(numbers))})")
    # a phase spans at least one step, so a table of one value is a constant
    if total == 1:
        return Schedule((_hold(0, numbers[0]),), 1, call=call)
    return Schedule((Phase(0, total - 1, 0, 0.0, 1.0, "table"),), total, numbers, call)


CONSTRUCTORS["table"] = table


def table_length(caller: str, total_steps: Any) -> int:
    """The number of values of a table, else ValueError; `caller` is what makes the table."""
    total = arguments.required_total_steps(caller, total_steps)
    return arguments.count("total_steps", total, at_least=1, at_most=_LONGEST_TABLE)


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
    passes = arguments.positive("epochs", epochs)
    batches = -(-arguments.count("examples", examples, 1) // arguments.count("batch_size", batch_size, 1))
    per_process = -(-batches // arguments.count("world_size", world_size, 1))
    per_epoch = -(-per_process // arguments.count("accumulation", accumulation, 1))
    if passes * per_epoch > arguments.MOST_STEPS:
        raise ValueError(f"epochs={arguments.shown(epochs)} of {per_epoch} updates are too many to count")
    return math.ceil(passes * per_epoch)
