"""A rate that is written into a group is used for the next step, however it is written."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import (
    PEAK,
    SCHEDULE,
    assert_same,
    disagreements,
    make,
    make_params,
    make_stock,
    quiet,
    recorded,
    scheduled,
    set_grads,
    silent,
    step,
    stepper_of,
    with_rates,
)
from snapshots import params_of
from torch import nn

import fusedlr

# ways to write a rate into a group
WRITES: dict[str, Callable[[dict[str, Any], Any], Any]] = {
    "item": lambda group, lr: operator.setitem(group, "lr", lr),
    "update": lambda group, lr: group.update(lr=lr),
    "update by a mapping": lambda group, lr: group.update({"eps": group["eps"], "lr": lr}),
    "update by pairs": lambda group, lr: group.update([("lr", lr)]),
    "or": lambda group, lr: operator.ior(group, {"lr": lr}),
    "setdefault": lambda group, lr: (operator.delitem(group, "lr"), group.setdefault("lr", lr)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("lr", [0.3, 0, 0.0, torch.tensor(0.3)], ids=str)
def test_a_rate_written_from_outside_is_used_for_the_next_step(write, lr):
    optimizer = scheduled()
    step(optimizer, 0)
    step(optimizer, 1)
    write(optimizer.param_groups[0], lr)
    with quiet():
        step(optimizer, 2)
    step(optimizer, 3)
    rates = [SCHEDULE.lr_at(k, PEAK) for k in range(4)]
    rates[2] = float(lr)
    assert_same(optimizer, with_rates(rates))
    # it was a step of the run, and the schedule has its group back
    assert optimizer.metrics()["step"].tolist() == [4]
    assert optimizer.param_groups[0]["lr"] == rates[3]


def test_a_rate_may_be_written_before_the_first_step():
    optimizer = scheduled()
    optimizer.param_groups[0]["lr"] = 0.3
    with quiet():
        step(optimizer, 0)
    assert_same(optimizer, with_rates([0.3]))
    assert optimizer.metrics()["step"].tolist() == [1]


def test_a_present_rate_is_not_written_by_setdefault():
    optimizer = scheduled()
    assert optimizer.param_groups[0].setdefault("lr", 0.3) == 0.0
    step(optimizer, 0)
    assert_same(optimizer, with_rates([0.0]))


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_the_rate_that_is_shown_may_be_written_back(write):
    """Wrappers write whole groups back before every step, ZeroRedundancyOptimizer for one."""
    optimizer = scheduled()
    for k in range(3):
        step(optimizer, k)
    write(optimizer.param_groups[0], optimizer.param_groups[0]["lr"])
    with silent():
        step(optimizer, 3)
    assert_same(optimizer, with_rates([SCHEDULE.lr_at(k, PEAK) for k in range(4)]))


def test_a_scheduler_that_has_taken_over_may_hold_its_rate():
    """Its number is not the one that the optimizer shows, even where it is the one that it showed before."""
    optimizer = scheduled()
    step(optimizer, 0)
    shown = SCHEDULE.lr_at(0, PEAK)
    rates = [shown]
    with quiet():
        for k, rate in enumerate([0.3, shown, shown], start=1):
            optimizer.param_groups[0]["lr"] = rate
            step(optimizer, k)
            rates.append(rate)
    assert_same(optimizer, with_rates(rates))


def test_the_schedulers_step_after_a_write_is_the_last_writer():
    optimizer = scheduled()
    step(optimizer, 0)
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.scheduler.step()
    assert optimizer.param_groups[0]["lr"] == SCHEDULE.lr_at(1, PEAK)
    with recorded() as caught:
        step(optimizer, 1)
    assert not disagreements(caught)
    assert_same(optimizer, with_rates([SCHEDULE.lr_at(k, PEAK) for k in range(2)]))


def test_other_keys_may_be_written_freely():
    optimizer = scheduled()
    optimizer.param_groups[0]["weight_decay"] = 0.5
    optimizer.param_groups[0].update(eps=1e-3)
    step(optimizer, 0)
    step(optimizer, 1)
    rates = [SCHEDULE.lr_at(k, PEAK) for k in range(2)]
    assert_same(optimizer, with_rates(rates, weight_decay=0.5, eps=1e-3))


def test_a_rate_written_after_another_option_does_not_hide_it():
    ours, stock = make(), make_stock()
    for each in (ours, stock):
        step(each, 0)
        each.param_groups[0]["weight_decay"] = 0.5
        each.param_groups[0]["lr"] = 0.25
        step(each, 1)
    assert_same(ours, stock)


def test_an_option_that_is_assigned_what_it_is_is_no_news(monkeypatch):
    optimizer = scheduled()
    step(optimizer, 0)

    def refuse(*options):
        raise AssertionError("options were taken anew")

    monkeypatch.setattr(stepper_of(optimizer), "assign", refuse)
    optimizer.param_groups[0].update(weight_decay=0.01, eps=1e-8, maximize=False)
    step(optimizer, 1)


def test_a_number_takes_the_place_of_a_tensor_that_equals_it():
    optimizer = scheduled()
    decay = torch.tensor(0.5)
    optimizer.param_groups[0]["weight_decay"] = decay
    optimizer.param_groups[0]["weight_decay"] = 0.5
    decay.fill_(0.25)
    step(optimizer, 0)
    assert_same(optimizer, with_rates([SCHEDULE.lr_at(0, PEAK)], weight_decay=0.5))


def test_an_option_that_no_step_knows_may_be_taken_out():
    group = scheduled().param_groups[0]
    assert (group.pop("fused"), group.pop("fused", "gone")) == (None, "gone")
    with pytest.raises(KeyError, match="fused"):
        group.pop("fused")


def test_only_the_group_that_was_written_is_driven_from_outside():
    a, b, *_ = make_params()
    optimizer = fusedlr.FusedAdamW([{"params": [a]}, {"params": [b]}], lr=PEAK, schedule=SCHEDULE)
    step(optimizer, 0)
    optimizer.param_groups[1]["lr"] = 0.3
    with quiet():
        step(optimizer, 1)
    assert optimizer.metrics()["lr"].tolist() == pytest.approx([SCHEDULE.lr_at(1, PEAK), 0.3], rel=1e-15)


def test_a_written_rate_survives_a_group_that_is_added():
    optimizer = scheduled()
    step(optimizer, 0)
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert optimizer.param_groups[0]["lr"] == 0.3
    with quiet():
        step(optimizer, 1)
    assert optimizer.metrics()["lr"].tolist() == [0.3, 0.0]


@pytest.mark.parametrize("copied", [dict, copy.copy, copy.deepcopy, dict.copy], ids=lambda f: f.__qualname__)
def test_plain_dicts_put_into_param_groups_are_watched_again(copied):
    optimizer = scheduled()
    step(optimizer, 0)
    group = copied(optimizer.param_groups[0])
    assert type(group) is dict
    # a deep copy has parameters of its own
    group["params"] = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0] = group
    step(optimizer, 1)
    assert_same(optimizer, with_rates([SCHEDULE.lr_at(k, PEAK) for k in range(2)]))
    optimizer.param_groups[0]["lr"] = 0.3
    with quiet():
        step(optimizer, 2)
    assert optimizer.metrics()["lr"].item() == 0.3


def test_a_plain_dict_with_another_rate_was_written_from_outside():
    optimizer = scheduled()
    step(optimizer, 0)
    optimizer.param_groups = [{**group, "lr": 0.3} for group in optimizer.param_groups]
    with quiet():
        step(optimizer, 1)
    assert_same(optimizer, with_rates([SCHEDULE.lr_at(0, PEAK), 0.3]))


def test_a_plain_dict_may_bring_a_schedule():
    optimizer = make()
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "schedule": fusedlr.linear(total_steps=4)}
    for k in range(4):
        step(optimizer, k)
    assert_same(optimizer, with_rates([PEAK * (4 - k) / 4 for k in range(4)]))


def test_a_schedule_given_to_a_running_group_takes_over():
    optimizer = make()
    step(optimizer, 0)
    optimizer.param_groups[0]["schedule"] = fusedlr.linear(total_steps=4)
    step(optimizer, 1)
    assert_same(optimizer, with_rates([PEAK, PEAK * 3 / 4]))


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        ("linear", TypeError, "schedule='linear' is not a fusedlr.Schedule"),
        (SCHEDULE, ValueError, "is a tensor, which a schedule cannot drive"),
    ],
    ids=["no schedule", "a tensor rate"],
)
def test_a_schedule_that_cannot_drive_a_running_group_is_refused(schedule, error, message):
    optimizer = make(lr=torch.tensor(PEAK))
    step(optimizer, 0)
    optimizer.param_groups[0]["schedule"] = schedule
    set_grads(optimizer, 1)
    before = [p.detach().clone() for p in params_of(optimizer)]
    for _ in range(2):
        with pytest.raises(error, match=message):
            optimizer.step()
    assert all(map(torch.equal, before, params_of(optimizer)))


def test_a_rate_written_to_a_group_of_another_optimizer_is_used_where_the_group_is_now():
    optimizer, other = scheduled(), scheduled()
    optimizer.param_groups[:] = other.param_groups
    step(optimizer, 0)
    optimizer.param_groups[0]["lr"] = 0.3
    with quiet():
        step(optimizer, 1)
    assert optimizer.metrics()["lr"].item() == 0.3


def test_one_warning_in_all_names_both_rates_and_points_at_the_caller():
    optimizer = scheduled()
    step(optimizer, 0)
    with recorded() as caught:
        for k in range(1, 6):
            optimizer.param_groups[0]["lr"] = 0.3
            set_grads(optimizer, k)
            optimizer.step()
    (warning,) = disagreements(caught)
    assert "lr=0.3 was assigned to group 0 from outside" in str(warning.message)
    assert f"gives {SCHEDULE.lr_at(1, PEAK):g}" in str(warning.message)
    assert "schedule=None" in str(warning.message)
    assert warning.filename == __file__


def test_a_tensor_is_not_compared_with_the_schedule():
    """On a GPU to read it would wait."""
    optimizer = scheduled()
    optimizer.param_groups[0]["lr"] = torch.tensor(optimizer.param_groups[0]["lr"])
    with pytest.warns(UserWarning, match="lr=a tensor was assigned to group 0 from outside"):
        step(optimizer, 0)


def test_no_warning_where_the_foreign_rate_is_the_schedules():
    optimizer = scheduled()
    with recorded() as caught:
        step(optimizer, 0)
        for k in range(1, 8):
            # as another formula would round it
            optimizer.param_groups[0]["lr"] = SCHEDULE.lr_at(k, PEAK) * (1 + 1e-15)
            step(optimizer, k)
    assert not disagreements(caught)
