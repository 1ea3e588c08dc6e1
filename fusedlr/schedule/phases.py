"""The definition of every learning rate schedule: phases in units of the peak, and what they give at a step.

C++ and CUDA (csrc/schedule.h), Triton (fusedlr/backends/gpu/triton_schedule.py) and numpy (the tests'
schedule_numpy.py) spell `phase_weights` again under the same names, and tests hold each of them to this file
at every step. The reference step runs this file's own code on device tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusedlr import arguments

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
# shapes that divide or raise by their parameter
_SHAPES_WITH_PARAM = ("cosine", "restarts", "polynomial", "inverse_sqrt")
# the last step that a phase may name: k is exact in fp64 up to here, and in int64 with room for products
LAST_STEP = 2**53
# kernels count in int64
_INT64 = 2**63


@dataclass(frozen=True)
class Absolute:
    """A level given as a learning rate, not as a ratio of the peak; `name` is the argument it came from."""

    lr: float
    name: str = "min_lr"

    def __post_init__(self) -> None:
        """Check the rate."""
        object.__setattr__(self, "lr", arguments.non_negative(self.name, self.lr))

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

    def __post_init__(self) -> None:
        """Check that the phase can be evaluated at every step, in int64 too; a table is checked with it."""
        arguments.choice("shape", self.shape, SHAPES, show=str)
        for name in ("begin", "end", "origin"):
            step = arguments.count(name, getattr(self, name), at_least=-LAST_STEP, at_most=LAST_STEP)
            object.__setattr__(self, name, step)
        if not self.origin <= self.begin <= self.end or self.end == self.origin:
            raise ValueError(f"a phase needs origin <= begin <= end and origin < end, got {self}")
        param = arguments.real("shape_param", self.shape_param)
        if not math.isfinite(param) or (self.shape in _SHAPES_WITH_PARAM and not param > 0):
            raise ValueError(f"shape_param={self.shape_param} must be above 0 in {self}")
        if self.shape in ("restarts", "table") and not param.is_integer():
            raise ValueError(f"shape_param={self.shape_param} must be a whole number in {self}")
        object.__setattr__(self, "shape_param", param)
        if not fits_int64(whole_and_rest(self)[0], self.end - self.origin):
            raise ValueError(f"shape_param={param} times the steps of the phase exceeds int64 in {self}")
        for name in ("from_", "to"):
            level = getattr(self, name)
            if not isinstance(level, Absolute):
                level = arguments.real(name, level)
                if not (math.isfinite(level) and level >= 0):
                    raise ValueError(f"a level must be a finite ratio of the peak >= 0, got {self}")
                object.__setattr__(self, name, level)


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


def fits_int64(whole: int, steps: int) -> bool:
    """Whether `whole` waves, restarts or places in a table times `steps` can be counted in int64."""
    return max(whole, 2) * steps < _INT64


def whole_and_rest(phase: Phase) -> tuple[int, float]:
    """A phase's parameter as what kernels reduce in integers, and the rest."""
    param = phase.shape_param
    if phase.shape == "cosine":
        return int(2 * param), 2 * param - int(2 * param)
    return (int(param), 0.0) if phase.shape in ("restarts", "table") else (0, param)
