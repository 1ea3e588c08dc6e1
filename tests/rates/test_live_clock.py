"""Schedules changed while they run: cooldown, rewarm and back, on every backend and through files."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import SCHEDULE, make, make_params, scheduled, silent, spoil, step, steps, two_groups
from tolerances import SCHEDULE_ULPS
from torch import nn

import fusedlr

PEAK, TOTAL = 0.01, 40
WEIGHTS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}
BASES = {
    "cosine": fusedlr.cosine(warmup_steps=5, total_steps=TOTAL),
    "restarts": fusedlr.cosine_with_restarts(total_steps=TOTAL, num_cycles=3),
    "restarts that grow": fusedlr.cosine_with_restarts(total_steps=TOTAL, num_cycles=3, cycle_mult=2.0),
    "table": fusedlr.table([1 / (1 + k) for k in range(TOTAL)]),
    "floor": fusedlr.linear(total_steps=TOTAL, min_lr=1e-3),
    "no end": fusedlr.inverse_sqrt(warmup_steps=4),
}
# in the warm-up, in the middle, past the end
BEGINS = (0, 2, 15, TOTAL + 3)


def rates(optimizer: fusedlr.FusedAdamW, begin: int, end: int) -> list[float]:
    """The rates that steps have used, as the device has them."""
    used = []
    for k in range(begin, end):
        step(optimizer, k)
        used.append(optimizer.metrics()["lr"][0].item())
    return used


def formula(base: fusedlr.Schedule, k: int, steps: int, shape: str, to: float) -> list[float]:
    """What DESIGN asks of a cooldown, and of the three updates past it."""
    r, floor = base.lr_at(k, PEAK), to * PEAK
    return [floor + (r - floor) * WEIGHTS[shape](min(i / steps, 1)) for i in range(steps + 3)]


def trained(k: int, schedule: fusedlr.Schedule = BASES["cosine"], **options: Any) -> fusedlr.FusedAdamW:
    """An optimizer that has made `k` steps."""
    optimizer = make(lr=PEAK, schedule=schedule, **options)
    steps(optimizer, 0, k)
    return optimizer


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("name", BASES)
def test_every_update_of_a_cooldown_gets_the_rate_of_the_formula(name, shape, device, backend):
    base = BASES[name].resolve(PEAK)
    for k in BEGINS:
        dtype = torch.float64 if backend == "reference" else torch.float32
        optimizer = make(make_params((dtype,), device=device), lr=PEAK, schedule=base, backend=backend)
        optimizer.param_groups[0]["k"] = k
        optimizer.cooldown(steps=9, shape=shape, to=0.05)
        # kernels on a GPU compute the rate in fp32, whose ulp is at most 2**-23 of it
        ulps = 0 if backend in ("reference", "cpu") else SCHEDULE_ULPS[shape]
        want = formula(base, k, 9, shape, 0.05)
        for i, (got, right) in enumerate(zip(rates(optimizer, k, k + 12), want, strict=True)):
            assert math.isclose(got, right, rel_tol=1e-13 + ulps * 2**-23), (k, i)
        # exactly `to` from its end on
        assert optimizer.param_groups[0]["lr"] == 0.05 * PEAK


def test_the_host_shows_what_the_device_uses():
    optimizer = trained(10)
    before = optimizer.param_groups[0]["lr"]
    optimizer.cooldown(5)
    # the rate just used stays, and that of the coming update is the one that it would have had
    assert optimizer.param_groups[0]["lr"] == before == BASES["cosine"].lr_at(9, PEAK)
    optimizer.scheduler.step()
    assert optimizer.scheduler.get_last_lr() == [BASES["cosine"].lr_at(10, PEAK)]
    shown, used = [], []
    for k in range(10, 17):
        shown += optimizer.scheduler.get_last_lr()
        used += rates(optimizer, k, k + 1)
        optimizer.scheduler.step()
    assert shown == pytest.approx(used, rel=1e-14, abs=1e-18) and used[-2:] == [0.0, 0.0]


def test_cancelling_goes_back_exactly_and_shows_the_coming_rate():
    optimizer, other = trained(10), trained(10)
    base = optimizer.param_groups[0]["schedule"]
    optimizer.cooldown(5)
    steps(optimizer, 10, 13), steps(other, 10, 13)
    optimizer.rewarm(4)
    steps(optimizer, 13, 15), steps(other, 13, 15)
    optimizer.scheduler.step()
    optimizer.cancel_cooldown()
    assert optimizer.param_groups[0]["schedule"] is base
    assert optimizer.scheduler.get_last_lr() == [base.lr_at(15, PEAK)]
    assert rates(optimizer, 15, 45) == rates(other, 15, 45)


def test_a_second_cooldown_begins_where_the_first_has_come_to():
    optimizer = trained(10)
    optimizer.cooldown(10, "linear", to=0.2)
    first = optimizer.param_groups[0]["schedule"]
    steps(optimizer, 10, 14)
    optimizer.cooldown(3, "cosine")
    assert rates(optimizer, 14, 20) == pytest.approx(formula(first, 14, 3, "cosine", 0.0), rel=1e-13)


def test_rewarm_rises_to_the_peak_and_holds_it():
    optimizer = trained(30)
    r = BASES["cosine"].lr_at(30, PEAK)
    optimizer.rewarm(4)
    want = [r + (PEAK - r) * min(i / 4, 1) for i in range(20)]
    assert rates(optimizer, 30, 50) == pytest.approx(want, rel=1e-14)
    # another peak, twice in a row; the group's own is what it was
    optimizer.rewarm(2, peak=3 * PEAK)
    optimizer.rewarm(2, peak=3 * PEAK)
    assert rates(optimizer, 50, 54) == pytest.approx([PEAK, 2 * PEAK, 3 * PEAK, 3 * PEAK], rel=1e-14)
    assert optimizer.param_groups[0]["initial_lr"] == PEAK


def test_skipped_steps_do_not_move_it():
    optimizer = trained(10, max_grad_norm=1.0)
    optimizer.cooldown(6, "linear")
    want = formula(BASES["cosine"], 10, 6, "linear", 0.0)
    got = rates(optimizer, 10, 13)
    for k in range(3):
        step(optimizer, k)
        optimizer.param_groups[0]["params"][0].grad.fill_(math.inf)
        optimizer.step()
        got.append(optimizer.metrics()["lr"].item())
    # the last of them was skipped, and the next step makes up for it
    assert optimizer.metrics()["skipped"] == 3
    assert optimizer.metrics()["step"].item() == 16
    assert rates(optimizer, 16, 18) == pytest.approx(want[6:8], abs=1e-18)


def test_a_cooldown_after_skips_begins_at_the_update_that_is_next():
    optimizer = trained(5, max_grad_norm=1.0)
    for k in range(4):
        step(optimizer, k)
        spoil(optimizer)
        optimizer.step()
    k = optimizer.metrics()["step"].item()
    optimizer.cooldown(6)
    assert optimizer.param_groups[0]["schedule"].changes[-1].k == k == 9


def test_groups_of_their_own_peaks_and_schedules_cool_down_together():
    optimizer = two_groups()
    steps(optimizer, 0, 4)
    bases = [group["schedule"] for group in optimizer.param_groups]
    optimizer.cooldown(4, "linear", to=0.5)
    for group, base in zip(optimizer.param_groups, bases, strict=True):
        assert group["schedule"].lr_at(4) == base.lr_at(4)
        assert group["schedule"].lr_at(8, group["initial_lr"]) == 0.5 * group["initial_lr"]
    # of the first group; others in proportion
    optimizer.rewarm(2, peak=2 * optimizer.param_groups[0]["initial_lr"])
    for group in optimizer.param_groups:
        assert group["schedule"].lr_at(6) == 2.0


def test_groups_that_share_a_schedule_share_the_new_one():
    params = make_params()
    optimizer = scheduled([{"params": params[:2]}, {"params": params[2:], "lr": 0.5}])
    first, second = optimizer.param_groups
    assert first["schedule"] is second["schedule"]
    optimizer.cooldown(5)
    # the tables of a GPU have it once
    assert first["schedule"] is second["schedule"] and first["schedule"].changes


def scoped() -> fusedlr.FusedAdamW:
    groups: list[dict[str, Any]] = [
        {"params": [nn.Parameter(torch.ones(3))], "scope": "a", "schedule": SCHEDULE},
        {"params": [nn.Parameter(torch.ones(3))], "scope": "a", "schedule": SCHEDULE, "lr": 0.2},
        {"params": [nn.Parameter(torch.ones(3))], "scope": "b", "schedule": SCHEDULE},
        {"params": [nn.Parameter(torch.ones(3))], "scope": "c"},
    ]
    return make(groups)


def changes(optimizer: fusedlr.FusedAdamW) -> list[int]:
    """Per group how often its schedule was changed; -1 without one."""
    schedules = [group.get("schedule") for group in optimizer.param_groups]
    return [-1 if schedule is None else len(schedule.changes) for schedule in schedules]


def test_scopes_cool_down_by_name_each_at_its_own_update():
    optimizer = scoped()
    for k in range(4):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(3)
        optimizer.step(only=("a",) if k else None)
    optimizer.cooldown(3, only="a")
    assert changes(optimizer) == [1, 1, 0, -1]
    optimizer.cooldown(3)
    assert changes(optimizer) == [1, 1, 1, -1]
    begun = [group["schedule"].changes[0].k for group in optimizer.param_groups[:3]]
    assert begun == [4, 4, 1]
    optimizer.cancel_cooldown(only=["b"])
    assert changes(optimizer) == [1, 1, 0, -1]
    # an empty choice is none
    optimizer.rewarm(3, peak=0.1, only=())
    assert changes(optimizer) == [1, 1, 0, -1]
    # a scope begun anew begins its schedule as it was
    optimizer.reset_scope("a")
    assert changes(optimizer) == [0, 0, 0, -1]
    assert optimizer.param_groups[0]["schedule"] == SCHEDULE


def test_a_scope_takes_its_cooldown_along():
    one, other = scoped(), scoped()
    one.cooldown(3, only="a")
    other.load_scope_state_dict("a", one.scope_state_dict("a"))
    assert changes(other) == [1, 1, 0, -1]
    other.load_scope_state_dict("a", scoped().scope_state_dict("a"))
    assert changes(other) == [0, 0, 0, -1]


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """As a file has it."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def continued(optimizer: fusedlr.FusedAdamW, other: fusedlr.FusedAdamW, k: int) -> None:
    """Both go on at the same rates, and after a cancel again."""
    assert rates(other, k, k + 4) == rates(optimizer, k, k + 4)
    optimizer.cancel_cooldown(), other.cancel_cooldown()
    assert other.param_groups[0]["schedule"] == optimizer.param_groups[0]["schedule"]
    assert rates(other, k + 4, k + 8) == rates(optimizer, k + 4, k + 8)


@pytest.mark.parametrize("name", BASES)
def test_a_file_goes_on_with_the_cooldown_and_can_cancel_it(name):
    optimizer = trained(10, BASES[name])
    optimizer.cooldown(8)
    steps(optimizer, 10, 13)
    other = make(lr=PEAK, schedule=BASES[name])
    with silent():
        other.load_state_dict(saved(optimizer.state_dict()))
    continued(optimizer, other, 13)


def test_a_file_from_before_a_cooldown_takes_it_back():
    optimizer = trained(10)
    before = saved(optimizer.state_dict())
    optimizer.cooldown(8)
    steps(optimizer, 10, 13)
    with silent():
        optimizer.load_state_dict(before)
    assert optimizer.param_groups[0]["schedule"] == BASES["cosine"]
    assert rates(optimizer, 10, 14) == [BASES["cosine"].lr_at(k, PEAK) for k in range(10, 14)]


@pytest.mark.parametrize("scheduler_first", (True, False))
def test_the_schedulers_state_carries_it_where_the_optimizers_lost_it(scheduler_first):
    optimizer = trained(10)
    optimizer.cooldown(8)
    steps(optimizer, 10, 13)
    file, scheduler = saved(optimizer.state_dict()), saved(optimizer.scheduler.state_dict())
    del file["fusedlr"]
    other = make(lr=PEAK, schedule=BASES["cosine"])
    loads = [lambda: other.scheduler.load_state_dict(scheduler), lambda: other.load_state_dict(file)]
    with silent():
        for load in loads if scheduler_first else loads[::-1]:
            load()
    continued(optimizer, other, 13)


def test_a_detour_through_stock_adamw_leaves_the_cooldown_of_the_optimizer():
    optimizer = trained(10)
    optimizer.cooldown(8)
    stock = torch.optim.AdamW(make_params(), lr=PEAK)
    stock.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(stock.state_dict())
    assert optimizer.param_groups[0]["schedule"].changes


def test_another_schedule_is_reported_and_cools_down_as_the_file_says():
    optimizer = trained(10)
    optimizer.cooldown(8)
    longer = fusedlr.cosine(warmup_steps=5, total_steps=2 * TOTAL)
    other = make(lr=PEAK, schedule=longer)
    with pytest.warns(UserWarning, match="the checkpoint's run has 40 updates, this one 80"):
        other.load_state_dict(saved(optimizer.state_dict()))
    assert other.param_groups[0]["schedule"] == longer.cooldown(10, 8)


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))))
def test_copies_and_pickles_go_on_with_it(copied):
    optimizer = trained(10)
    optimizer.cooldown(8)
    steps(optimizer, 10, 13)
    other = copied(optimizer)
    assert ".cooldown(k=10, steps=8) of peak 0.01" in repr(other)
    continued(optimizer, other, 13)


def test_a_damaged_cooldown_in_a_file_is_refused_and_changes_nothing():
    optimizer = trained(10)
    optimizer.cooldown(8)
    file = saved(optimizer.state_dict())
    for place, value in ((0, -2), (1, 2), (2, -1), (3, 0), (4, 0), (5, 2.0), (5, math.nan), (6, -1)):
        numbers = file["fusedlr"]["groups"][0]["schedule"]
        bad = copy.deepcopy(file)
        bad["fusedlr"]["groups"][0]["schedule"] = [*numbers[:place], value, *numbers[place + 1 :]]
        other = trained(3)
        with pytest.raises(ValueError, match="not a schedule in numbers: "):
            other.load_state_dict(bad)
        assert other.param_groups[0]["schedule"] is not None and changes(other) == [0]
        assert other.param_groups[0]["k"] == 3


def test_what_extends_a_schedule_wants_it_as_it_was():
    optimizer = trained(3)
    optimizer.cooldown(8)
    with pytest.raises(ValueError, match="does not get total_steps=80: cancel the cooldown first"):
        optimizer.extend_schedule(80)
    optimizer.cancel_cooldown()
    optimizer.extend_schedule(80)
    optimizer.cooldown(8)
    # another schedule for the whole run begins without
    optimizer.start_schedule(BASES["cosine"])
    assert changes(optimizer) == [0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.cooldown(3, only="c"), "group 3, of scope 'c', has no schedule that could be changed"),
        (lambda o: o.rewarm(3, only=("a", "c")), "group 3, of scope 'c', has no schedule"),
        (lambda o: o.cancel_cooldown(only="c"), "group 3, of scope 'c', has no schedule"),
        (lambda o: o.cooldown(3, only="x"), "only='x' is no scope of this optimizer"),
        (lambda o: o.cooldown(3, only=torch.ones(3, dtype=torch.bool)), "names of scopes here, not a tensor"),
        (lambda o: o.cancel_cooldown(), "no group has a cooldown that could be cancelled"),
        (lambda o: o.cooldown(0), "steps=0 must be at least 1"),
        (lambda o: o.cooldown(2.5), "steps=2.5 is not an integer"),
        (lambda o: o.cooldown(3, "1-cos"), "shape='1-cos' is unknown"),
        (lambda o: o.cooldown(3, to=-0.1), "to=-0.1 must be a finite number >= 0"),
        (lambda o: o.cooldown(3, to=2), r"to=2 must be a ratio in \[0, 1\]"),
        (lambda o: o.rewarm(0), "steps=0 must be at least 1"),
        (lambda o: o.rewarm(3, peak="x"), "peak='x' is not a number"),
        (lambda o: o.rewarm(3, peak=-1), "peak=-1 must be a finite number >= 0"),
    ],
)
def test_what_cannot_be_changed_is_refused_and_left_alone(call, message):
    optimizer = scoped()
    with pytest.raises(ValueError, match=message):
        call(optimizer)
    assert changes(optimizer) == [0, 0, 0, -1]


def test_an_optimizer_without_a_schedule_or_a_peak_says_so():
    with pytest.raises(ValueError, match="no group has a schedule that could be changed"):
        make().cooldown(3)
    with pytest.raises(
        ValueError, match="cannot be a multiple of the peak of group 0, the first, which is 0"
    ):
        scheduled(lr=0.0).rewarm(3, peak=0.1)
    scheduled(lr=0.0).rewarm(3)
