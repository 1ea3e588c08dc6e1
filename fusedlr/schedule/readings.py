"""What other frameworks mean by a cosine with warm-up, put together from schedules of this package.

docs/explore.md and docs/make_pictures.py draw them; docs/schedules.md says who reads it how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fusedlr.schedule.constructors import CONSTRUCTORS
from fusedlr.schedule.describe import share_text, warmup_steps
from fusedlr.schedule.schedule import Schedule

_COSINES = (CONSTRUCTORS["cosine"], CONSTRUCTORS["cosine_with_min_lr"])


@dataclass(frozen=True)
class Reading:
    """Another meaning of the words of a schedule.

    Attributes:
        name: the reading in a legend.
        used_by: who reads it so.
        of: from a schedule to its reading, which gives the ratio of the peak at a step.
        consequence: from a schedule to a sentence about what differs.
    """

    name: str
    used_by: str
    of: Callable[[Schedule], Callable[[int], float]]
    consequence: Callable[[Schedule], str]


def applies(schedule: Schedule) -> bool:
    """Whether it is a cosine behind a warm-up, so that there is more than one reading."""
    call, total = schedule.call, schedule.total_steps
    return call is not None and call.build in _COSINES and 0 < warmup_steps(schedule) < (total or 0)


def literal(schedule: Schedule) -> Callable[[int], float]:
    """The cosine over the whole run, of which the warm-up hides the beginning.

    >>> import fusedlr
    >>> round(literal(fusedlr.cosine(400, 4000))(400), 4)
    0.9755
    """
    warmup, whole = warmup_steps(schedule), _whole(schedule)
    return lambda k: schedule.lr_at(k) if k < warmup else whole.lr_at(k)


def product(schedule: Schedule) -> Callable[[int], float]:
    """The cosine over the whole run, times the warm-up.

    >>> import fusedlr
    >>> round(product(fusedlr.cosine(400, 4000))(200), 4)
    0.4969
    """
    warmup, whole = warmup_steps(schedule), _whole(schedule)
    return lambda k: whole.lr_at(k) * (schedule.lr_at(k) if k < warmup else 1.0)


def _whole(schedule: Schedule) -> Schedule:
    """The same cosine without its warm-up: it begins to fall at update 0."""
    call = schedule.call
    assert call is not None and call.build is not None
    whole = call.build(**{**dict(call.arguments), "warmup_steps": 0, "warmup_from": 0.0})
    return whole if call.peak is None else whole.resolve(call.peak)


def _jump(schedule: Schedule) -> str:
    warmup = warmup_steps(schedule)
    reached = _whole(schedule).lr_at(warmup)
    return (
        "behind the warm-up the cosine has been falling since update 0: where the warm-up ends "
        f"(k = {warmup:,}) it gives {share_text(reached)} of the peak, a jump of the rate by "
        f"{share_text(1 - reached)} of the peak"
    )


def _lower_peak(schedule: Schedule) -> str:
    ratio, warmup = product(schedule), warmup_steps(schedule)
    top = max(map(ratio, range(max(0, warmup - 1), warmup + 1)))
    return f"nothing jumps, and the peak is never reached: at the end of the warm-up {share_text(top)} of it"


READINGS = {
    "literal": Reading("t/T over the whole run", "timm's CosineLRScheduler", literal, _jump),
    "product": Reading("whole cosine times warm-up", "detectron2's WarmupCosineLR", product, _lower_peak),
}
