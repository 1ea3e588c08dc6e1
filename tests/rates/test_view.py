"""`optimizer.scheduler` is a scheduler to those who ask, and counts nothing; its state is LambdaLR's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from kit import PEAK, SCHEDULE, assert_same, counters, make, make_stock, quiet, scheduled, step, with_rates
from snapshots import changes, snapshot, unchanged
from torch import nn
from torch.optim import lr_scheduler

import fusedlr


def test_the_view_is_a_scheduler_to_those_who_ask():
    optimizer = scheduled()
    view = optimizer.scheduler
    assert isinstance(view, lr_scheduler.LRScheduler)
    assert view.optimizer is optimizer
    assert optimizer.scheduler is view
    # accelerate would take a scheduler with this for OneCycleLR
    assert not hasattr(view, "total_steps")
    # LRScheduler's constructor wraps the step
    assert "step" not in vars(optimizer)
    assert view.base_lrs == [PEAK]
    assert view.get_lr() == view.get_last_lr() == view._last_lr == [0.0]
    assert all(type(rate) is float for rate in view.get_last_lr())


def test_the_view_counts_nothing():
    optimizer = scheduled()
    for k in range(5):
        step(optimizer, k)
        before = snapshot(optimizer, lr=False)
        # once per process, as accelerate does, with whatever arguments
        for _ in range(4):
            optimizer.scheduler.step()
        optimizer.scheduler.step(17)
        optimizer.scheduler.step(epoch=3)
        assert not changes(before, snapshot(optimizer, lr=False))
        assert optimizer.scheduler.last_epoch == k + 1
    assert_same(optimizer, with_rates([SCHEDULE.lr_at(k, PEAK) for k in range(5)]))


def test_the_view_may_be_stepped_before_the_optimizer():
    optimizer = scheduled()
    for k in range(5):
        optimizer.scheduler.step()
        step(optimizer, k)
    assert_same(optimizer, with_rates([SCHEDULE.lr_at(k, PEAK) for k in range(5)]))


def test_what_accelerate_counts_in_the_view_has_no_effect():
    optimizer = scheduled()
    step(optimizer, 0)
    optimizer.scheduler._step_count += 1
    assert optimizer.scheduler._step_count == 1
    optimizer.scheduler.step()
    assert (optimizer.scheduler._step_count, optimizer.scheduler.last_epoch) == (2, 1)


def test_the_view_of_an_optimizer_without_a_schedule_leaves_the_rate_alone():
    optimizer = make()
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.scheduler.step()
    assert optimizer.scheduler.get_last_lr() == [0.3]
    step(optimizer, 0)
    optimizer.scheduler.step()
    assert optimizer.scheduler.last_epoch == 1
    assert_same(optimizer, with_rates([0.3]))


def lambda_states(steps: int) -> tuple[dict, dict]:
    """State of the view and of a real LambdaLR after as many steps."""
    ours, stock = scheduled(), make_stock()
    # a plain function is saved as None
    foreign = lr_scheduler.LambdaLR(stock, lambda k: SCHEDULE.lr_at(k))
    for k in range(steps):
        step(ours, k)
        ours.scheduler.step()
        step(stock, k)
        foreign.step()
    return ours.scheduler.state_dict(), foreign.state_dict()


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_the_views_state_is_lambda_lrs_in_plain_numbers(steps):
    ours, theirs = lambda_states(steps)
    assert (ours.pop("k"), ours.pop("k_at_epoch")) == ([steps], steps)
    assert ours.pop("fusedlr")["groups"][0]["k"] == steps
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert type(ours[key]) is type(value), key
        assert ours[key] == (pytest.approx(value, rel=1e-15) if key == "_last_lr" else value), key


def plain(x: Any) -> bool:
    if isinstance(x, dict):
        return all(type(key) is str and plain(value) for key, value in x.items())
    if isinstance(x, list):
        return all(map(plain, x))
    return x is None or type(x) in (int, float, bool, str)


def test_the_views_state_loads_with_weights_only(tmp_path):
    optimizer = scheduled()
    step(optimizer, 0)
    state = optimizer.scheduler.state_dict()
    assert plain(state)
    torch.save(state, tmp_path / "scheduler.pt")
    assert torch.load(tmp_path / "scheduler.pt", weights_only=True) == state


def test_the_views_state_loads_into_lambda_lr():
    ours, _ = lambda_states(5)
    foreign = lr_scheduler.LambdaLR(make_stock(), lambda k: SCHEDULE.lr_at(k))
    foreign.load_state_dict(ours)
    assert foreign.last_epoch == 5
    foreign.step()
    assert foreign.get_last_lr() == [SCHEDULE.lr_at(6, PEAK)]


@pytest.mark.parametrize("scheduler_first", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_a_schedulers_state_overrides_the_optimizers_in_either_order(theirs, scheduler_first):
    source = scheduled()
    for k in range(3):
        step(source, k)
    view_state = lambda_states(7)[1 if theirs else 0]
    optimizer = scheduled()
    loads = [
        lambda: optimizer.load_state_dict(source.state_dict()),
        lambda: optimizer.scheduler.load_state_dict(view_state),
    ]
    for load in reversed(loads) if scheduler_first else loads:
        load()
    assert optimizer.scheduler.last_epoch == 7
    assert optimizer.param_groups[0]["lr"] == SCHEDULE.lr_at(7, PEAK)
    step(optimizer, 7)
    assert optimizer.metrics()["lr"].item() == pytest.approx(SCHEDULE.lr_at(7, PEAK), rel=1e-15)
    assert optimizer.metrics()["step"].tolist() == [8]
    # a checkpoint loaded later in the run counts again
    with quiet():
        optimizer.load_state_dict(source.state_dict())
    assert optimizer.scheduler.last_epoch == 3


def test_loading_a_schedulers_state_keeps_the_callers_dict():
    state = lambda_states(2)[0]
    before = copy.deepcopy(state)
    scheduled().scheduler.load_state_dict(state)
    assert state == before


@pytest.mark.parametrize(("there", "here"), [(SCHEDULE, None), (None, SCHEDULE)])
def test_a_state_from_before_or_after_there_was_a_schedule_brings_its_step_alone(there, here):
    source, optimizer = make(schedule=there), make(schedule=here)
    step(source, 0), step(source, 1)
    group = optimizer.param_groups[0]
    peak = group.get("initial_lr")
    optimizer.scheduler.load_state_dict(source.scheduler.state_dict())
    assert (group["k"], group.get("schedule"), group.get("initial_lr")) == (2, here, peak)


def test_groups_that_differ_in_their_count_keep_it_through_the_views_state():
    optimizer = scheduled()
    step(optimizer, 0)
    step(optimizer, 1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))]})
    step(optimizer, 2)
    state = optimizer.scheduler.state_dict()
    assert state["k"] == [3, 1]
    twin = scheduled()
    twin.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))]})
    twin.scheduler.load_state_dict(state)
    assert twin.metrics()["step"].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "last_epoch=None in the scheduler's state is not an integer"),
        ({"last_epoch": 2.5}, "last_epoch=2.5 in the scheduler's state is not an integer"),
        ({"last_epoch": "3"}, "last_epoch='3' in the scheduler's state is not an integer"),
        ({"last_epoch": -1}, "last_epoch=-1 in the scheduler's state is negative"),
        ({"last_epoch": 4, "k": [-3], "k_at_epoch": 4}, "-3 in the scheduler's state is negative"),
    ],
)
def test_a_schedulers_state_without_a_step_is_refused(state, message):
    optimizer = scheduled()
    step(optimizer, 0)
    with unchanged(optimizer), pytest.raises(ValueError, match=message):
        optimizer.scheduler.load_state_dict(state)


def test_the_view_survives_pickle_and_deepcopy_with_its_optimizer():
    optimizer = scheduled()
    step(optimizer, 0)
    for twin in (
        copy.deepcopy((optimizer, optimizer.scheduler)),
        pickle.loads(pickle.dumps((optimizer, optimizer.scheduler))),
    ):
        other, view = twin
        assert view.optimizer is other is not optimizer
        step(other, 1)
        view.step()
        assert view.last_epoch == 2
        assert optimizer.scheduler.last_epoch == 0


def test_the_view_says_that_it_cannot_be_driven():
    optimizer = scheduled()
    other = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    with pytest.raises(AttributeError, match="schedule=None"):
        lr_scheduler.SequentialLR(optimizer, [optimizer.scheduler, other], milestones=[3])


def test_scheduler_state_is_that_of_the_updates_made_when_the_host_ran_ahead():
    optimizer = scheduled(lr=0.1, schedule=fusedlr.linear(0, 10))
    for _ in range(6):
        optimizer.step()
    # on a GPU the host learns of skips late: four of these steps were none
    counters(optimizer).k.fill_(2)
    state = optimizer.scheduler.state_dict()
    assert (state["k"], state["last_epoch"]) == ([2], 2)
    assert state["_last_lr"] == pytest.approx([0.08])
