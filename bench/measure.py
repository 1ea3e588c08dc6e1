"""Timing, on the CPU's clock or by a GPU's events: steppers interleaved within rounds, and the bandwidth."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Step = Callable[[], Any]

# a sample lasts at least this long: reading the clock (0.1 us) and calling the step (0.1 us) are then noise
SAMPLE_MS = 2.0
# a step this long streams more than caches hold (0.5 GB at 10 GB/s): what ran before it does not matter
LONG_MS = 50.0
# quartiles of fewer samples say nothing
FEWEST_ROUNDS = 5
# more do not move the median of a quiet machine by 1 %
MOST_ROUNDS = 200


@dataclass(frozen=True)
class Sample:
    """Time per step: until the work is done, and until the host is free again. The same on the CPU."""

    ms: float
    host_ms: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """The spread of at least one value."""
        values = list(values)
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


def time_on_cpu(step: Step, repeats: int) -> Sample:
    """Time of `repeats` steps in a row, per step."""
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    ms = 1e3 * (time.perf_counter() - begin) / repeats
    return Sample(ms, ms)


def time_on_cuda(step: Step, repeats: int) -> Sample:
    """Time between events around `repeats` steps in a row, and the host's time to queue them, per step."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # an idle GPU and an empty queue: the host's time is its own, and no earlier work is counted
    torch.cuda.synchronize()
    host = time.perf_counter()
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    host_ms = 1e3 * (time.perf_counter() - host) / repeats
    end.synchronize()
    return Sample(begin.elapsed_time(end) / repeats, host_ms)


def timer(device: torch.device) -> Callable[[Step, int], Sample]:
    """The timing function for a device."""
    return time_on_cuda if device.type == "cuda" else time_on_cpu


def interleave(
    steps: Mapping[str, Step],
    device: torch.device,
    rounds: int | None,
    seconds: float,
    note: Callable[[str], None] = lambda text: None,
    measure: Callable[[Any, int], Sample] | None = None,
) -> dict[str, list[Sample]]:
    """Samples of every stepper, one per round, in an order that rotates; `measure` is the device's `timer`.

    Before each sample of short steps one is not counted: it finds its data where the others left the caches.
    Without `rounds`, as many as fit into `seconds`, within limits.
    """
    measure = measure or timer(device)
    names = list(steps)
    collecting = gc.isenabled()
    # a collection would land on whoever is running
    gc.collect()
    gc.disable()
    try:
        once = {name: _estimate(step, measure) for name, step in steps.items()}
        repeats = {name: max(1, math.ceil(SAMPLE_MS / ms)) for name, ms in once.items()}
        uncounted = {name: ms < LONG_MS for name, ms in once.items()}
        round_ms = sum(once[name] * (repeats[name] + uncounted[name]) for name in names)
        count = rounds or min(max(FEWEST_ROUNDS, int(1e3 * seconds / round_ms)), MOST_ROUNDS)
        samples: dict[str, list[Sample]] = {name: [] for name in names}
        for i in range(count):
            note(f"round {i + 1} of {count}")
            for name in names[i % len(names) :] + names[: i % len(names)]:
                if uncounted[name]:
                    steps[name]()
                samples[name].append(measure(steps[name], repeats[name]))
    finally:
        if collecting:
            gc.enable()
    return samples


def ratio(over: list[Sample], under: list[Sample]) -> Spread:
    """Of the times of one stepper over those of another, within each round."""
    return Spread.of(a.ms / b.ms for a, b in zip(over, under, strict=True))


def _estimate(step: Step, measure: Callable[[Step, int], Sample]) -> float:
    # the smaller of two: the first may still allocate
    return max(min(measure(step, 1).ms for _ in range(2)), 1e-4)


def in_place_pass(moved: int, device: torch.device) -> Step:
    """An operation that reads and writes `moved` bytes in all, in place, as the step does with its own.

    A negation: one operation per element in torch's own loop, on as many threads as it takes. What a step
    could reach if arithmetic cost nothing.
    """
    x = torch.ones(max(1, moved // 8), device=device)  # 4 bytes read and 4 written per element
    return x.neg_
