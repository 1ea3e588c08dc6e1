"""What schedules hold in bounds: numbers of a hostile file, steps in int64, and arguments of odd types."""

from __future__ import annotations

import math
import time
import tracemalloc
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import fusedlr
from fusedlr import Phase, Schedule
from fusedlr.schedule import Absolute

GOOD = fusedlr.linear(2, 20).to_numbers()
TABLE = fusedlr.table([1.0, 0.5, 0.2]).to_numbers()


def changed(numbers, place, value):
    numbers = list(numbers)
    numbers[place] = value
    return numbers


HOSTILE = [
    (changed(GOOD, 0, 1e12), r"numbers\[0\], the number of phases,=1000000000000.0 must be at most 2"),
    (changed(GOOD, 0, 0), r"numbers\[0\], the number of phases,=0 must be at least 1"),
    (changed(GOOD, 0, True), r"numbers\[0\], the number of phases,=True is not an integer"),
    (changed(GOOD, 0, 1.5), r"numbers\[0\], the number of phases,=1.5 is not an integer"),
    (changed(GOOD, 0, math.nan), r"numbers\[0\], the number of phases,=nan is not an integer"),
    (changed(GOOD, 0, math.inf), r"numbers\[0\], the number of phases,=inf is not an integer"),
    (changed(GOOD, 1, -2), r"numbers\[1\], total_steps,=-2 must be at least -1"),
    (changed(GOOD, 1, 0), "total_steps=0 must be at least 1"),
    (changed(GOOD, 1, 2.0**60), r"numbers\[1\], total_steps,=1.15\d*e\+18 must be at most"),
    (changed(GOOD, 1, "9"), r"numbers\[1\], total_steps,='9' is not an integer"),
    (changed(GOOD, 3, 1e300), r"numbers\[2:9\], phase 0: end=1e\+300 must be at most"),
    (changed(GOOD, 3, 2.5), r"numbers\[2:9\], phase 0: end=2.5 is not an integer"),
    (changed(GOOD, 4, -(2.0**60)), r"numbers\[2:9\], phase 0: origin=-1.15\d*e\+18 must be at least"),
    (changed(GOOD, 5, -0.5), r"numbers\[2:9\], phase 0: a level must be a finite ratio"),
    (changed(GOOD, 6, math.inf), r"numbers\[2:9\], phase 0: a level must be a finite ratio"),
    (changed(GOOD, 6, 10**400), r"numbers\[2:9\], phase 0: to=10+\.\. is too large"),
    (changed(GOOD, 7, -1), r"numbers\[7\], shape of phase 0,=-1 must be at least 0"),
    (changed(GOOD, 7, 9), r"numbers\[7\], shape of phase 0,=9 must be at most 8"),
    (changed(GOOD, 14, 0.5), r"numbers\[14\], shape of phase 1,=0.5 is not an integer"),
    (changed(GOOD, 8, math.nan), r"numbers\[2:9\], phase 0: shape_param=nan must be above 0"),
    (changed(TABLE, -1, -1.0), r"table\[2\]=-1.0 must be a finite number >= 0"),
    (changed(TABLE, -1, math.nan), r"table\[2\]=nan must be a finite number >= 0"),
    (changed(TABLE, -1, None), r"table\[2\]=None is not a number"),
    (changed(TABLE, 8, 1), "table has 3 values, too few"),
    (changed(TABLE, 8, 0.5), "shape_param=0.5 must be a whole number"),
    (changed(TABLE, 8, -1), "table has 3 values, too few"),
    (
        [*TABLE[:5], 1.0, 0.0, *TABLE[7:-1], 2.5],
        "table has a value of 2.5, which gives a negative rate",
    ),
    ([], r"\[\] is not a list of at least 9 numbers"),
    ("linear", "'linear' is not a list of at least 9 numbers"),
    (None, "None is not a list of at least 9 numbers"),
    ({"phases": 1}, "is not a list of at least 9 numbers"),
]


@pytest.mark.parametrize(
    ("numbers", "message"), HOSTILE, ids=lambda x: x[:40] if isinstance(x, str) else None
)
def test_hostile_numbers_are_refused_by_name(numbers, message):
    with pytest.raises(ValueError, match=f"not a schedule in numbers: .*{message}"):
        Schedule.from_numbers(numbers)


@pytest.mark.parametrize("claimed", [1e6, 1e12, 2**62, 10**400])
def test_a_list_that_claims_many_phases_costs_nothing(claimed):
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="the number of phases"):
        Schedule.from_numbers(changed(GOOD, 0, claimed))
    seconds, peak = time.perf_counter() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a slice per phase claimed took 8 s and 60 MiB for a million
    assert seconds < 1
    assert peak < 2**20


TOO_LARGE = {
    "total_steps": lambda: fusedlr.cosine(0, 2**63),
    "warmup_steps": lambda: fusedlr.constant_with_warmup(2**60),
    "decay_steps": lambda: fusedlr.warmup_stable_decay(0, 2**60, stable_steps=1),
    "warmup_steps plus stable_steps plus decay_steps": lambda: fusedlr.warmup_stable_decay(
        0, 2**52, stable_steps=2**52
    ),
    "timescale": lambda: fusedlr.inverse_sqrt(0, timescale=2**70),
    "num_cycles=1e\\+300": lambda: fusedlr.cosine(0, 10, num_cycles=1e300),
    "num_cycles=1000000.0 is too large over 10000000000000 steps": lambda: fusedlr.cosine(
        0, 10**13, num_cycles=1e6
    ),
    "num_cycles=10000000000000 is too large over 1000000 steps": lambda: fusedlr.cosine_with_restarts(
        0, 10**6, num_cycles=10**13
    ),
    "num_cycles=1000000.0 is too large": lambda: fusedlr.cosine_with_min_lr(
        0, 10**13, min_lr_ratio=0.1, num_cycles=1e6
    ),
    "num_cycles=1000000.0": lambda: fusedlr.cosine_warmup_with_min_lr(
        0, 10**13, min_lr_ratio=0.1, num_cycles=1e6
    ),
    "num_cycles=1e\\+18": lambda: fusedlr.warmup_stable_decay(0, 10**6, 10**7, num_cycles=1e18),
    "num_cycles=1000000 must be at most 65536": lambda: fusedlr.cosine_with_restarts(
        0, 10**9, num_cycles=10**6, cycle_mult=1.0000001
    ),
    "total_steps=1000000000000 must be at most 16777216": lambda: fusedlr.table(lambda k: 1.0, 10**12),
    "epochs=1e\\+308": lambda: fusedlr.total_steps(10**6, 1, epochs=1e308),
    "shape_param=1000000.0 times the steps": lambda: Phase(0, 2**50, 0, 1.0, 0.0, "restarts", 1e6),
}


@pytest.mark.parametrize("message", TOO_LARGE)
def test_steps_that_do_not_fit_are_refused_when_built(message):
    with pytest.raises(ValueError, match=message):
        TOO_LARGE[message]()


def test_the_largest_that_is_accepted_runs_and_is_the_definition():
    schedule = fusedlr.cosine(0, 2**52, num_cycles=1000.5)
    for k in (1, 2**51 + 12345, 2**52 - 1):
        p = torch.nn.Parameter(torch.ones(2))
        optimizer = fusedlr.FusedAdamW([p], lr=1.0, schedule=schedule)
        optimizer.scheduler.load_state_dict({"last_epoch": k})
        p.grad = torch.ones(2)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule.lr_at(k), rel=1e-12, abs=1e-15)


ODD = {
    "cosine(num_cycles=True)": lambda: fusedlr.cosine(0, 9, num_cycles=True),
    "cosine(num_cycles=np.True_)": lambda: fusedlr.cosine(0, 9, num_cycles=np.bool_(True)),
    "cosine(num_cycles=tensor bool)": lambda: fusedlr.cosine(0, 9, num_cycles=torch.tensor(True)),
    "cosine(num_cycles=bytes)": lambda: fusedlr.cosine(0, 9, num_cycles=b"1"),
    "cosine(num_cycles=complex tensor)": lambda: fusedlr.cosine(0, 9, num_cycles=torch.tensor(1 + 0j)),
    "cosine(num_cycles=meta)": lambda: fusedlr.cosine(0, 9, num_cycles=torch.ones((), device="meta")),
    "cosine(num_cycles=two)": lambda: fusedlr.cosine(0, 9, num_cycles=torch.ones(2)),
    "cosine(num_cycles=10**5000)": lambda: fusedlr.cosine(0, 9, num_cycles=10**5000),
    "cosine(min_lr_ratio=10**400)": lambda: fusedlr.cosine(0, 9, min_lr_ratio=10**400),
    "linear(warmup_from=nan)": lambda: fusedlr.linear(0, 9, warmup_from=np.float32("nan")),
    "linear(total_steps=nan tensor)": lambda: fusedlr.linear(0, torch.tensor(math.nan)),
    "linear(total_steps=10**5000)": lambda: fusedlr.linear(0, 10**5000),
    "wsd(warmup_type=tensor)": lambda: fusedlr.warmup_stable_decay(1, 2, 9, warmup_type=torch.ones(2)),
    "wsd(decay_type=list)": lambda: fusedlr.warmup_stable_decay(1, 2, 9, decay_type=["linear"]),
    "table(fn=None)": lambda: fusedlr.table(None),
    "table(fn=0-dim)": lambda: fusedlr.table(torch.tensor(1.0)),
    "table(fn=set)": lambda: fusedlr.table({0.1, 1.0}),
    "table(fn=dict)": lambda: fusedlr.table({0: 1.0}),
    "table(fn=text)": lambda: fusedlr.table("111"),
    "phase(begin=0.5)": lambda: Phase(0.5, 2.5, 0.5, 0, 1, "linear"),
    "phase(end='5')": lambda: Phase(0, "5", 0, 0, 1, "linear"),
    "phase(level='1')": lambda: Phase(0, 5, 0, "1", 1, "linear"),
    "phase(shape=list)": lambda: Phase(0, 5, 0, 0, 1, ["linear"]),
    "phase(shape_param=True)": lambda: Phase(0, 5, 0, 0, 1, "polynomial", True),
    "schedule(phases=None)": lambda: Schedule(None),
    "schedule(phases=rows)": lambda: Schedule(((0, 5, 0, 0, 1, "linear"),)),
    "schedule(table=text)": lambda: Schedule((Phase(0, 5, 0, 0, 1, "linear"),), table="11"),
    "absolute(lr=nan)": lambda: Absolute(math.nan),
    "resolve('x')": lambda: fusedlr.cosine(0, 9, min_lr=0.1).resolve("x"),
    "describe('x')": lambda: fusedlr.cosine(0, 9).describe("x"),
    "with_total_steps('x')": lambda: fusedlr.cosine(0, 9).with_total_steps("x"),
    "from_hf(name=list)": lambda: fusedlr.from_hf(["cosine"], 1, 2),
    "from_hf(lr='x')": lambda: fusedlr.from_hf("cosine", 1, 20, lr="x"),
    "from_hf(kwargs=list)": lambda: fusedlr.from_hf("cosine", 1, 20, scheduler_specific_kwargs=[1]),
    "total_steps(epochs=nan)": lambda: fusedlr.total_steps(10, 1, epochs=math.nan),
}


@pytest.mark.parametrize("call", ODD)
def test_odd_types_are_refused_by_name(call):
    argument = call.split("(")[1].split("=")[0].strip("')")
    # the argument where the method names another one, or the value
    named = {"x": "peak|total_steps", "level": "from_", "kwargs": "scheduler_specific_kwargs"}
    with pytest.raises(ValueError, match=named.get(argument, argument)) as error:
        ODD[call]()
    assert len(str(error.value)) < 500


NUMBERS = (4, 4.0, np.int8(4), np.float32(4), np.array(4), torch.tensor(4), torch.tensor([4.0]), Fraction(4))


@pytest.mark.parametrize("four", [*NUMBERS, Decimal(4)], ids=repr)
def test_numbers_of_any_type_are_the_same_schedule(four):
    schedule = fusedlr.cosine(four, 20, num_cycles=four)
    assert schedule == fusedlr.cosine(4, 20, num_cycles=4)
    assert eval(repr(schedule), vars(fusedlr)) == schedule
    assert schedule.with_total_steps(40) == fusedlr.cosine(4, 40, num_cycles=4)


def test_a_tensor_is_read_once():
    cycles = torch.tensor(0.5)
    schedule = fusedlr.cosine(0, 20, num_cycles=cycles)
    cycles.fill_(3)
    assert schedule.with_total_steps(40) == fusedlr.cosine(0, 40, num_cycles=0.5)


def test_phases_and_tables_hold_plain_numbers():
    phase = Phase(np.int64(0), torch.tensor(2), 0.0, np.float32(0), 1, "table", np.int8(0))
    schedule = Schedule([phase], np.int32(3), np.array([1.0, 0.5, 0.25]))
    assert [type(x) for x in (phase.begin, phase.end, phase.origin)] == [int] * 3
    assert [type(x) for x in (phase.from_, phase.to, phase.shape_param)] == [float] * 3
    assert schedule == Schedule.from_numbers(schedule.to_numbers())
    assert type(schedule.total_steps) is int
    assert schedule.table == (1.0, 0.5, 0.25)


def test_values_without_an_end_are_taken_as_far_as_they_are_needed():
    def halves():
        rate = 1.0
        while True:
            yield rate
            rate /= 2

    assert fusedlr.table(halves(), total_steps=3) == fusedlr.table([1.0, 0.5, 0.25])
