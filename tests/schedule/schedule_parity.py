"""The harness that holds every spelling of the schedule to the fp64 definition, at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import tolerances
from numpy.typing import NDArray

from fusedlr import Schedule
from schedule.schedule_zoo import PEAK

# learning rates of updates k: evaluator(schedule, k, peak), k of dtype int64 and any order
Evaluator = Callable[[Schedule, NDArray[np.int64], float], NDArray]

# up to this length every step of a run is looked at
_EVERY_STEP = 5000
# steps far from any run: before its start, past 32 bits, past every fp32 integer
_FAR = (-(10**9), -(2**31) - 1, -1, 2**24 + 1, 10**9, 10**9 + 1, 2**31, 2**32 + 3, 2**40 + 1)


@lru_cache(maxsize=256)
def definition(schedule: Schedule, peak: float = PEAK) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The steps to look at and what `lr_at` says there."""
    k = steps(schedule)
    return k, np.array([schedule.lr_at(step, peak) for step in k.tolist()])


def steps(schedule: Schedule) -> NDArray[np.int64]:
    """Every step of a short run and some past it, the ends and a sample of a long one; far steps."""
    ends = [edge for phase in schedule.phases for edge in (phase.begin, phase.end)]
    # a phase without an end does not make the run longer
    last = max(schedule.total_steps or 0, *(end for end in ends if end < 2**40))
    near = [edge + d for edge in ends for d in range(-4, 5)]
    if last <= _EVERY_STEP:
        inside = np.arange(-3, last + 50)
    else:
        generator = np.random.default_rng(last)
        # steps are dense at both ends of the run, where rates or slopes are small: on a logarithmic scale
        scale = np.geomspace(1, last, 500).astype(np.int64)
        inside = np.concatenate([scale, last - scale, generator.integers(0, last, 1000)])
    return np.unique(np.concatenate([inside, near, _FAR]).astype(np.int64))


def bounds(schedule: Schedule, k: NDArray[np.int64], want: NDArray, peak: float, real: type) -> NDArray:
    """Largest error allowed at each step, in units of the learning rate."""
    ulp = np.spacing(np.abs(want).astype(real)).astype(np.float64)
    allowed = np.zeros(k.shape)
    for i, phase in enumerate(schedule.phases):
        begun = (k >= phase.begin) | (i == 0)
        if real is np.float64:
            bound = tolerances.SCHEDULE_ULPS_FP64 * ulp
        elif phase.shape == "cosine" and not float(2 * phase.shape_param).is_integer():
            bound = np.full(k.shape, tolerances.SCHEDULE_UNEVEN_COSINE * peak)
        else:
            bound = tolerances.SCHEDULE_ULPS[phase.shape] * ulp
        allowed = np.where(begun, bound, allowed)
    # below the smallest normal number a device may flush to 0; a true 0 stays exactly 0
    return np.where(want == 0, 0.0, np.maximum(allowed, np.finfo(real).tiny))


def differences(
    evaluator: Evaluator, schedule: Schedule, real: type = np.float32, peak: float = PEAK
) -> Iterator[str]:
    """In words, every step where a spelling of precision `real` leaves the bounds."""
    k, want = definition(schedule, peak)
    with np.errstate(all="ignore"):
        got = np.asarray(evaluator(schedule, k, peak), np.float64)
    assert got.shape == want.shape, f"{schedule!r}: {got.shape} values for {want.shape} steps"
    allowed = bounds(schedule, k, want, peak, real)
    # the comparison is negated, so that nan counts as an error
    for i in np.flatnonzero(~(np.abs(got - want) <= allowed)):
        yield (
            f"{schedule!r} at k = {k[i]}: {got[i]!r} instead of {want[i]!r}, "
            f"off by {abs(got[i] - want[i]):.3g}, allowed {allowed[i]:.3g}"
        )


def check(evaluator: Evaluator, schedule: Schedule, real: type = np.float32, peak: float = PEAK) -> None:
    """Assert that a spelling agrees with the definition at every step."""
    found = list(differences(evaluator, schedule, real, peak))
    assert not found, f"{len(found)} steps differ, such as\n" + "\n".join(found[:5])
