"""What may become of a running schedule: a cooldown or a rewarm-up from some update on, as more phases.

`Schedule.cooldown` and `Schedule.rewarm` use it. A change is data, so that a schedule goes back exactly to
what it was, and a file carries both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusedlr import arguments
from fusedlr.schedule.phases import SHAPES, Phase, evaluate

KINDS = ("cooldown", "rewarm")
# shapes that fall from one level to another and end there -> the parameter of their phase
FALLS = {"linear": 0.0, "cosine": 0.5, "1-sqrt": 0.0}
# what `to_numbers` writes of every change, in this order
COLUMNS = ("kind", "k", "steps", "shape", "to")


@dataclass(frozen=True)
class Change:
    """From update `k` on the rate goes from where it is to `to`, over `steps` updates, and stays there.

    Attributes:
        kind: one of `KINDS`.
        k: the first update that it concerns; this one still gets the rate that it would have had.
        steps: updates until `to` is reached.
        shape: one of `FALLS`.
        to: a ratio of the peak.
    """

    kind: str
    k: int
    steps: int
    shape: str
    to: float

    def __post_init__(self) -> None:
        """Check every value: a file may say anything."""
        arguments.choice("kind", self.kind, KINDS, show=str)
        arguments.choice("shape", self.shape, FALLS, show=str)
        object.__setattr__(self, "k", arguments.count("k", self.k))
        object.__setattr__(self, "steps", arguments.count("steps", self.steps, at_least=1))
        # a rewarm-up may go above the peak that the run was begun with
        check = arguments.ratio if self.kind == "cooldown" else arguments.non_negative
        object.__setattr__(self, "to", check("to", self.to))

    def __str__(self) -> str:
        """The call that makes it."""
        shape = "" if (self.kind, self.shape) in _DEFAULT_SHAPES else f", shape={self.shape!r}"
        to = "" if self.to == _DEFAULT_TO[self.kind] else f", to={self.to!r}"
        return f"{self.kind}(k={self.k}, steps={self.steps}{shape}{to})"

    def to_numbers(self) -> list[float]:
        """Plain numbers, as `COLUMNS` has them."""
        return [KINDS.index(self.kind), self.k, self.steps, SHAPES.index(self.shape), self.to]

    @staticmethod
    def from_numbers(numbers: Sequence[Any]) -> Change:
        """The change that `to_numbers` wrote.

        Raises:
            ValueError: a number is out of range.
        """
        row = dict(zip(COLUMNS, numbers, strict=True))
        row["kind"] = KINDS[arguments.count("kind", row["kind"], 0, len(KINDS) - 1)]
        row["shape"] = SHAPES[arguments.count("shape", row["shape"], 0, len(SHAPES) - 1)]
        return Change(**row)


_DEFAULT_SHAPES = {("cooldown", "1-sqrt"), ("rewarm", "linear")}
_DEFAULT_TO = {"cooldown": 0.0, "rewarm": 1.0}


def changed_phases(
    phases: Sequence[Phase], table: Sequence[float], changes: Sequence[Change]
) -> tuple[Phase, ...]:
    """The phases of a schedule, with levels that are all ratios, after these changes one after the other."""
    left = list(phases)
    for change in changes:
        while len(left) > 1 and left[-1].begin > change.k:
            left.pop()
        # the last phase that has begun gives the rate
        level = evaluate(left[-1:], change.k, table)
        if left[-1].begin >= change.k:
            left.pop()
        end, param = change.k + change.steps, FALLS[change.shape]
        left.append(Phase(change.k, end, change.k, level, change.to, change.shape, param))
    return tuple(left)
