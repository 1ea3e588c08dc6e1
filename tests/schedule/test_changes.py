"""Schedules that are changed while they run: cooldowns and warm-ups as values."""

from __future__ import annotations

import copy
import math
import pickle

import pytest

import fusedlr
from fusedlr import Schedule
from schedule.schedule_zoo import PEAK, ZOO

WEIGHTS = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}
BASES = [name for name in ZOO if not ZOO[name].changes]
CHANGED = [name for name in ZOO if ZOO[name].changes]


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("name", BASES)
def test_a_cooldown_is_its_formula_from_any_update_of_any_schedule(name, shape):
    base = ZOO[name].resolve(PEAK)
    total = min(base.total_steps or 100, 10**6)
    for k in {0, 1, total // 3, total - 1, total, total + 7}:
        for steps, to in ((1, 0.0), (13, 0.2)):
            cooled, r = base.cooldown(k, steps, shape, to), base.lr_at(k, PEAK)
            for i in range(steps + 3):
                w = WEIGHTS[shape](min(i / steps, 1.0))
                want = to * PEAK + (r - to * PEAK) * w
                assert math.isclose(cooled.lr_at(k + i, PEAK), want, rel_tol=1e-13, abs_tol=1e-15 * PEAK)
            # exact where it begins and where it ends
            assert cooled.lr_at(k, PEAK) == r
            assert cooled.lr_at(k + steps, PEAK) == cooled.lr_at(10**9, PEAK) == to * PEAK
            # the past stays as it was
            past = range(max(0, k - 20), k)
            assert [cooled.lr_at(j, PEAK) for j in past] == [base.lr_at(j, PEAK) for j in past]
            assert cooled.original is base and cooled.with_changes(()) is base
            assert cooled.total_steps == k + steps


@pytest.mark.parametrize("name", CHANGED)
def test_numbers_copies_and_pickles_carry_the_changes_and_the_original(name):
    schedule = ZOO[name]
    others = (
        Schedule.from_numbers(schedule.to_numbers()),
        copy.deepcopy(schedule),
        pickle.loads(pickle.dumps(schedule)),
    )
    for other in others:
        assert other == schedule and other.changes == schedule.changes
        assert other.original == schedule.original and other.with_changes(()) == schedule.original
        assert other.to_numbers() == schedule.to_numbers()


def test_the_call_that_is_shown_makes_it_again():
    for name in CHANGED:
        text = repr(ZOO[name])
        # a table shows how many values it has
        if "<" not in text:
            assert eval(text, vars(fusedlr)) == ZOO[name], text
    assert repr(fusedlr.linear(total_steps=9).cooldown(4, 2, "cosine", 0.5)) == (
        "linear(total_steps=9).cooldown(k=4, steps=2, shape='cosine', to=0.5)"
    )


def test_a_rewarm_goes_straight_to_its_level_and_leaves_the_length_of_the_run():
    base = fusedlr.linear(total_steps=100)
    warm = base.cooldown(50, 10).rewarm(55, 10, to=2.0)
    r = base.cooldown(50, 10).lr_at(55)
    for i in range(12):
        assert math.isclose(warm.lr_at(55 + i), r + (2.0 - r) * min(i / 10, 1.0), rel_tol=1e-14)
    assert warm.total_steps == 100 and base.rewarm(98, 10).total_steps == 108
    assert fusedlr.constant().rewarm(5, 5).total_steps is None


def test_a_change_replaces_those_that_have_not_happened():
    base = fusedlr.linear(total_steps=100)
    cooled = base.cooldown(50, 10)
    # at the same update, and after the run was put back to an earlier one
    for k in (50, 20):
        assert cooled.cooldown(k, 5, "linear") == base.cooldown(k, 5, "linear")
        assert len(cooled.cooldown(k, 5, "linear").changes) == 1


def test_what_became_of_it_is_described():
    text = fusedlr.linear(total_steps=100).cooldown(50, 10).rewarm(55, 10).describe(peak=0.1)
    assert "cooldown from k = 50 on: from 0.05 (50 % of the peak) to 0 % of the peak, " in text
    assert "which update k = 60 gets; 1-sqrt" in text
    assert "rewarm from k = 55 on" in text and "update k = 65 gets; linear" in text
    # the highest rate of a run without an end may lie at the end of a warm-up
    assert "highest update (k = 30)" in fusedlr.constant().rewarm(10, 20, to=1.5).describe()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 5), "k=-1 must be at least 0"),
        ((1.5, 5), "k=1.5 is not an integer"),
        ((2**60, 5), "must be at most"),
        ((5, 0), "steps=0 must be at least 1"),
        ((5, 2**60), "must be at most"),
        ((5, 5, "wave"), "shape='wave' is unknown, expected one of linear, cosine, 1-sqrt"),
        ((5, 5, "linear", 1.5), r"to=1.5 must be a ratio in \[0, 1\]"),
        ((5, 5, "linear", math.nan), "to=nan must be a finite number"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        fusedlr.linear(total_steps=10).cooldown(*arguments)


def test_levels_must_be_ratios_and_a_changed_schedule_has_no_longer_one():
    with pytest.raises(ValueError, match="has an absolute level"):
        fusedlr.linear(total_steps=10, min_lr=1e-5).cooldown(3, 2)
    with pytest.raises(ValueError, match="cancel the cooldown first"):
        fusedlr.linear(total_steps=10).cooldown(3, 2).with_total_steps(20)


_LINEAR = fusedlr.linear(total_steps=10).to_numbers()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([-1, 0, 5, 3, 0, 0.0, *_LINEAR], r"numbers\[1:6\], change 0: shape='constant' is unknown"),
        ([-1, 2, 5, 3, 6, 0.0, *_LINEAR], "change 0: kind=2 must be at most 1"),
        ([-1, 0, -5, 3, 6, 0.0, *_LINEAR], "change 0: k=-5 must be at least 0"),
        ([-1, 0, 5, 0, 6, 0.0, *_LINEAR], "change 0: steps=0 must be at least 1"),
        ([-1, 0, 5, 3, 6, 1.5, *_LINEAR], "change 0: to=1.5 must be a ratio"),
        ([-1, 1, 5, 3, 1, math.inf, *_LINEAR], "change 0: to=inf must be a finite number"),
        ([-2, 0, 5, 3, 6, 0.0, 0, 5, 3, 6, 0.0, *_LINEAR], "changes must begin one after the other"),
        ([-1, 0, 5, 3, 6, 0.0, -1, 0, 5, 3, 6, 0.0, *_LINEAR], "number of phases,=-1 must be at least 1"),
        ([-9, 0, 5, 3, 6, 0.0, *_LINEAR], "number of changes,=9 must be at most 1"),
        ([-(10**9), *_LINEAR], "number of changes,=1000000000 must be at most 0"),
        ([-math.inf, *_LINEAR], "is not an integer"),
        ([-1, 0, 5, 3, 6, 0.0, *_LINEAR, "x"], r"table\[0\]='x'"),
    ],
)
def test_hostile_changes_are_refused_by_name(numbers, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_numbers(numbers)
