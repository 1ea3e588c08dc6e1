"""Random schedules: equal to transformers over the whole run, and with the properties of their kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import tolerances
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fusedlr
from fusedlr import Schedule

EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)
LR = 3e-4

warmups = st.one_of(st.integers(0, 3), st.integers(0, 3000), st.integers(0, 10**8))
totals = st.one_of(st.integers(1, 4), st.integers(1, 5000), st.integers(1, 10**9))
# where 1 - (k-W)/(T-W) goes under a root, transformers' own rounding is too large beyond
short_totals = st.one_of(st.integers(1, 4), st.integers(1, 5000), st.integers(1, 10**6))
ratios = st.floats(0, 1)
cycles = st.one_of(st.sampled_from([0.5, 1, 1.5, 2, 7.5]), st.floats(0.05, 12))
rates = st.one_of(st.just(0.0), st.floats(1e-12, LR))
floors = st.one_of(st.fixed_dictionaries({"min_lr": rates}), st.fixed_dictionaries({"min_lr_rate": ratios}))
types = st.sampled_from(["linear", "cosine", "1-sqrt"])


def own(**arguments: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of a schedule's own, each given or left at its default."""
    return st.fixed_dictionaries({}, optional=arguments)


# name -> (strategy of the run's length, strategy of the schedule's own arguments)
HF: dict[str, tuple[st.SearchStrategy[int], st.SearchStrategy[dict[str, Any]]]] = {
    "constant": (totals, own()),
    "constant_with_warmup": (totals, own()),
    "linear": (totals, own()),
    "cosine": (totals, own(num_cycles=cycles)),
    # at 22 cycles and more transformers' float modulo misses restarts that fall on a step
    "cosine_with_restarts": (totals, own(num_cycles=st.integers(1, 21))),
    "polynomial": (
        short_totals,
        own(power=st.floats(0.5, 8), lr_end=st.one_of(st.just(0.0), st.floats(1e-12, LR, exclude_max=True))),
    ),
    "inverse_sqrt": (totals, own(timescale=st.integers(1, 10**6))),
    "cosine_with_min_lr": (totals, st.builds(dict.__or__, floors, own(num_cycles=cycles))),
    "cosine_warmup_with_min_lr": (
        totals,
        st.builds(dict.__or__, floors, own(num_cycles=cycles, warmup_lr_rate=ratios)),
    ),
}


def transformers_ratio(name: str, warmup: int, total: int | None, arguments: dict[str, Any]) -> Any:
    """transformers' own function from the step to a ratio of the peak."""
    get_scheduler = pytest.importorskip("transformers").get_scheduler
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=LR)
    return get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=arguments).lr_lambdas[0]


def steps(data: st.DataObject, warmup: int, total: int, *joins: int) -> list[int]:
    """Updates of the run: its ends, those around the joins of phases, and random ones."""
    drawn = data.draw(st.lists(st.integers(0, total - 1), min_size=10, max_size=20))
    edges = [join + d for join in (0, warmup, total, *joins) for d in (-2, -1, 0, 1, 2)]
    return [k for k in (*edges, *drawn) if 0 <= k < total]


@pytest.mark.parametrize("name", HF)
@EXAMPLES
@given(data=st.data())
def test_equals_transformers(name: str, data: st.DataObject) -> None:
    lengths, arguments = (data.draw(strategy) for strategy in HF[name])
    # the warm-up is mostly shorter than the run, and sometimes as long or longer
    warmup = data.draw(st.one_of(st.integers(0, lengths), warmups))
    ratio = transformers_ratio(name, warmup, lengths, arguments)
    schedule = fusedlr.from_hf(name, warmup, lengths, LR, **arguments)
    # a wrong modulo shows where waves begin
    waves = arguments.get("num_cycles", 1)
    joins = [warmup + int((lengths - warmup) * i / waves) for i in range(1, math.ceil(waves))]
    for k in steps(data, warmup, lengths, *joins):
        assert schedule.lr_at(k, LR) == pytest.approx(LR * ratio(k), rel=0, abs=tolerances.SCHEDULE_HF * LR)


@EXAMPLES
@given(data=st.data())
def test_warmup_stable_decay_equals_transformers(data: st.DataObject) -> None:
    warmup, stable, decay = (data.draw(st.one_of(st.integers(0, 3), st.integers(0, 10**6))) for _ in range(3))
    total = warmup + stable + decay
    assume(total > 0)
    arguments = data.draw(own(warmup_type=types, decay_type=types, min_lr_ratio=ratios, num_cycles=cycles))
    arguments["num_decay_steps"] = decay
    run = data.draw(st.sampled_from([total, None]))
    if run is None:
        arguments["num_stable_steps"] = stable
    ratio = transformers_ratio("warmup_stable_decay", warmup, run, arguments)
    schedule = fusedlr.from_hf("warmup_stable_decay", warmup, run, LR, **arguments)
    assert schedule.total_steps == total
    for k in steps(data, warmup, total, warmup + stable):
        assert schedule.lr_at(k, LR) == pytest.approx(LR * ratio(k), rel=0, abs=tolerances.SCHEDULE_HF * LR)


# rounding of a sum of two products near the peak
ROUNDING = 4 * math.ulp(1.0)


@dataclass
class Drawn:
    """A schedule that rises once to the peak and then falls once to the floor."""

    schedule: Schedule
    warmup: int
    total: int
    floor: float
    first: float  # what update 0 gets when there is warm-up
    slope: float  # the largest step from one update to the next


@st.composite
def falling(draw: st.DrawFn) -> Drawn:
    total = draw(st.one_of(st.integers(1, 50), st.integers(1, 10**9)))
    warmup = draw(st.integers(0, total - 1))
    floor, first = draw(ratios), draw(ratios)
    n = total - warmup
    rise = 1 / warmup if warmup else 0.0
    kind = draw(st.sampled_from(["linear", "cosine", "polynomial", "inverse_sqrt", "wsd"]))
    if kind == "linear":
        schedule = fusedlr.linear(warmup, total, min_lr_ratio=floor, warmup_from=first)
        return Drawn(schedule, warmup, total, floor, first, max(rise, 1 / n))
    if kind == "cosine":
        schedule = fusedlr.cosine(warmup, total, min_lr_ratio=floor, warmup_from=first)
        return Drawn(schedule, warmup, total, floor, first, max(rise, math.pi / 2 / n))
    if kind == "polynomial":
        power = draw(st.floats(1, 9))
        schedule = fusedlr.polynomial(warmup, total, power=power, lr_end=floor, warmup_from=first)
        return Drawn(schedule, warmup, total, floor, first, max(rise, power / n))
    if kind == "inverse_sqrt":
        scale = draw(st.integers(1, 10**6))
        schedule = fusedlr.inverse_sqrt(warmup, total, timescale=scale, warmup_from=first)
        return Drawn(schedule, warmup, total, 0.0, first, max(rise, 0.5 / scale))
    decay = draw(st.integers(0, n))
    shapes = {"warmup_type": draw(types), "decay_type": draw(types)}
    schedule = fusedlr.warmup_stable_decay(warmup, decay, total, min_lr_ratio=floor, **shapes)
    # a root falls by sqrt(1/n) in its first step, and without decay the floor follows at once
    slope = max(math.sqrt(rise), math.pi / 2 * rise, math.pi / 2 / math.sqrt(decay) if decay else 1.0)
    return Drawn(schedule, warmup, total, floor, floor, slope)


@EXAMPLES
@given(drawn=falling(), ks=st.lists(st.integers(-5, 2 * 10**9), min_size=2, max_size=40))
def test_rises_and_then_falls(drawn: Drawn, ks: list[int]) -> None:
    lr_at, warmup = drawn.schedule.lr_at, drawn.warmup
    ks = sorted({*ks, *(k % (drawn.total + 1) for k in ks), warmup - 1, warmup, drawn.total})
    for a, b in pairwise(ks):
        if b <= warmup:
            assert lr_at(a) <= lr_at(b) + ROUNDING
        elif a >= warmup:
            assert lr_at(a) >= lr_at(b) - ROUNDING


@EXAMPLES
@given(drawn=falling(), ks=st.lists(st.integers(-(10**9), 2 * 10**9), min_size=1, max_size=40))
def test_stays_between_floor_and_peak(drawn: Drawn, ks: list[int]) -> None:
    lr_at, warmup = drawn.schedule.lr_at, drawn.warmup
    for k in {*ks, *(k % drawn.total for k in ks)}:
        lowest = min(drawn.first, drawn.floor) if k < warmup else drawn.floor
        assert lowest - ROUNDING <= lr_at(k) <= 1 + ROUNDING
    assert lr_at(warmup) == pytest.approx(1, abs=ROUNDING)
    if warmup:
        assert lr_at(0) == pytest.approx(drawn.first, rel=ROUNDING)


@EXAMPLES
@given(drawn=falling(), ks=st.lists(st.integers(0, 10**9), max_size=40))
def test_joins_without_a_jump(drawn: Drawn, ks: list[int]) -> None:
    lr_at = drawn.schedule.lr_at
    joins = [phase.begin - 1 for phase in drawn.schedule.phases]
    for k in (*joins, drawn.warmup, drawn.total - 1, drawn.total, *(k % drawn.total for k in ks)):
        assert abs(lr_at(k + 1) - lr_at(k)) <= drawn.slope * (1 + 1e-9) + ROUNDING


@EXAMPLES
@given(drawn=falling(), k=st.integers(-5, 2 * 10**9), peak=st.floats(1e-9, 1e3))
def test_scales_with_the_peak(drawn: Drawn, k: int, peak: float) -> None:
    schedule = drawn.schedule.resolve(1.0)
    assert schedule.lr_at(k, peak) == peak * schedule.lr_at(k)
    assert schedule.lr_at(k, 0.0) == 0


@EXAMPLES
@given(drawn=falling(), k=st.integers(-5, 2 * 10**9))
def test_round_trip_gives_the_same_bits(drawn: Drawn, k: int) -> None:
    schedule = drawn.schedule.resolve(1.0)
    twin = Schedule.from_numbers(schedule.to_numbers())
    assert twin == schedule
    assert twin.lr_at(k) == schedule.lr_at(k)
