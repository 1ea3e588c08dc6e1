"""A schedule is a value: it is equal to its copies, is written and read, and shows the call that built it."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest

import fusedlr
from fusedlr import Phase, Schedule
from fusedlr.schedule import CONSTRUCTORS, Absolute, constructors
from schedule.schedule_zoo import PEAK, ZOO

# the repr of a longer table leaves its values out
LABELLED = {name: s for name, s in ZOO.items() if len(s.table) <= 8}


@pytest.mark.parametrize("name", ZOO)
def test_round_trips(name: str) -> None:
    schedule = ZOO[name]
    resolved = schedule.resolve(PEAK)
    numbers = resolved.to_numbers()
    assert all(isinstance(x, (int, float)) for x in numbers)
    assert Schedule.from_numbers(numbers) == resolved
    # checkpoints may turn every number into a float
    assert Schedule.from_numbers([float(x) for x in numbers]) == resolved
    for twin in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert twin == schedule and hash(twin) == hash(schedule) and repr(twin) == repr(schedule)


@pytest.mark.parametrize("name", LABELLED)
def test_repr_is_the_call(name: str) -> None:
    schedule = LABELLED[name]
    names = {**vars(fusedlr.schedule), "Phase": Phase, "Absolute": Absolute, "Schedule": Schedule}
    assert eval(repr(schedule), names) == schedule
    resolved = schedule.resolve(PEAK)
    assert eval(repr(resolved), names) == resolved
    anonymous = Schedule.from_numbers(resolved.to_numbers())
    assert eval(repr(anonymous), names) == anonymous


def test_repr_leaves_out_defaults_and_long_tables() -> None:
    assert repr(fusedlr.cosine(10, total_steps=100)) == "cosine(warmup_steps=10, total_steps=100)"
    assert repr(fusedlr.linear(0.1, 100, min_lr_ratio=np.float64(0.5))) == (
        "linear(warmup_steps=0.1, total_steps=100, min_lr_ratio=0.5)"
    )
    assert repr(fusedlr.cosine_with_min_lr(5, 50, min_lr=1e-5).resolve(1e-4)) == (
        "cosine_with_min_lr(warmup_steps=5, total_steps=50, min_lr=1e-05).resolve(0.0001)"
    )
    table = fusedlr.table(range(1000))
    assert repr(table) == "table(<1000 values>)"
    assert len(repr(Schedule(table.phases, 1000, table.table))) < 200


def test_equality_is_about_values() -> None:
    assert fusedlr.cosine(10, 100) == fusedlr.cosine(0.1, 100, min_lr_ratio=0)
    assert fusedlr.cosine(10, 100, min_lr=1e-5) == fusedlr.cosine_with_min_lr(10, 100, min_lr=1e-5)
    assert fusedlr.cosine(10, 100) != fusedlr.cosine(10, 101)
    assert fusedlr.cosine(10, 100) != fusedlr.linear(10, 100)
    assert len({fusedlr.cosine(10, 100), fusedlr.cosine(10, 100), fusedlr.cosine(9, 100)}) == 2


def test_absolute_levels_wait_for_the_peak() -> None:
    schedule = fusedlr.linear(total_steps=10, min_lr=1e-5)
    assert schedule.resolve(1e-4) == fusedlr.linear(total_steps=10, min_lr_ratio=1e-5 / 1e-4)
    assert schedule.lr_at(10, peak=1e-4) == pytest.approx(1e-5, rel=1e-15)
    ratio = fusedlr.linear(total_steps=10)
    assert ratio.resolve(0.0) is ratio


def test_constructors_are_listed_and_public() -> None:
    built = {
        name
        for name, function in vars(constructors).items()
        if inspect.isfunction(function)
        and not name.startswith("_")
        and function.__module__ == constructors.__name__
        and inspect.signature(function).return_annotation == "Schedule"
    }
    assert set(CONSTRUCTORS) == built and {"cosine", "table"} < built
    assert all(getattr(fusedlr, name) is build for name, build in CONSTRUCTORS.items())


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_docstring_describes_every_argument(name: str) -> None:
    build = CONSTRUCTORS[name]
    lines = (inspect.getdoc(build) or "").splitlines()
    for argument in inspect.signature(build).parameters:
        assert sum(line.startswith(f"    {argument}: ") for line in lines) == 1, argument
