"""What a group shows as its rate, its peak and its schedule, before and after each step."""

from __future__ import annotations

import pytest
import torch
from kit import (
    PEAK,
    SCHEDULE,
    assert_same,
    make_params,
    scheduled,
    set_grads,
    slow_arrivals,
    spoil,
    step,
    steps,
    with_rates,
)
from torch import nn

import fusedlr
from fusedlr import counts as counts_module


def test_the_group_shows_the_rate_just_used_then_the_next():
    optimizer = scheduled()
    group = optimizer.param_groups[0]
    assert group["initial_lr"] == PEAK
    for k in range(14):
        # before the step: the rate it is going to use
        assert group["lr"] == optimizer.scheduler.get_last_lr()[0] == SCHEDULE.lr_at(k, PEAK)
        step(optimizer, k)
        assert group["lr"] == optimizer.scheduler.get_last_lr()[0] == SCHEDULE.lr_at(k, PEAK)
        assert optimizer.metrics()["lr"].item() == pytest.approx(SCHEDULE.lr_at(k, PEAK), rel=1e-15)
        optimizer.scheduler.step()
        assert type(group["lr"]) is float


def test_the_next_step_moves_the_rate_on_when_nobody_steps_the_scheduler():
    optimizer = scheduled()
    shown = []
    for k in range(14):
        step(optimizer, k)
        shown.append(optimizer.param_groups[0]["lr"])
    assert shown == [SCHEDULE.lr_at(k, PEAK) for k in range(14)]
    assert_same(optimizer, with_rates(shown))


def test_every_group_has_its_own_peak_and_schedule():
    a, b, *_ = make_params()
    c = nn.Parameter(torch.ones(2))
    other = fusedlr.cosine(total_steps=7)
    optimizer = fusedlr.FusedAdamW(
        [{"params": [a]}, {"params": [b], "lr": 1.0, "schedule": other}, {"params": [c], "schedule": None}],
        lr=PEAK,
        schedule=SCHEDULE,
    )
    assert optimizer.scheduler.base_lrs == [PEAK, 1.0, PEAK]
    for k in range(4):
        step(optimizer, k)
        assert optimizer.scheduler.get_last_lr() == [SCHEDULE.lr_at(k, PEAK), other.lr_at(k), PEAK]


def test_an_absolute_level_is_one_factor_for_all_groups():
    a, b, *_ = make_params()
    schedule = fusedlr.linear(total_steps=10, min_lr=PEAK / 10)
    optimizer = fusedlr.FusedAdamW([{"params": [a]}, {"params": [b], "lr": 1.0}], lr=PEAK, schedule=schedule)
    for k in range(12):
        step(optimizer, k)
    assert optimizer.scheduler.get_last_lr() == pytest.approx([PEAK / 10, 0.1], rel=1e-12)


def test_a_peak_changed_while_training_is_used_at_once():
    optimizer = scheduled()
    step(optimizer, 0)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    step(optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == SCHEDULE.lr_at(1, 1.0)


def test_a_group_that_makes_no_step_shows_the_rate_of_its_next(device, backend):
    a, b, c, *_ = make_params((torch.float32,), device=device)
    groups = [{"params": [a]}, {"params": [b]}, {"params": [c], "schedule": None, "lr": 0.5}]
    optimizer = scheduled(groups, groups="independent", backend=backend)
    for k in range(4):
        step(optimizer, k, missing=lambda k, i: i > 0 and k != 1)
    assert [group["k"] for group in optimizer.param_groups] == [4, 1, 1]
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([SCHEDULE.lr_at(3, PEAK), SCHEDULE.lr_at(1, PEAK), 0.5])


def test_an_absolute_floor_is_measured_by_a_rate_that_is_used():
    a, b, c, _ = make_params()
    groups = [{"params": [p], "lr": lr} for p, lr in ((a, 2e-4), (b, 3.2e-3))]
    # whose rate is no peak
    groups.append({"params": [c], "schedule": None})
    schedule = fusedlr.cosine(2, 10, min_lr=2e-5)
    with pytest.warns(UserWarning, match=r"min_lr=2e-05.* lr=0\.001.*0\.0002, 0\.0032"):
        fusedlr.FusedAdamW([dict(group) for group in groups], schedule=schedule)
    optimizer = fusedlr.FusedAdamW([dict(group) for group in groups], lr=2e-4, schedule=schedule)
    assert optimizer.param_groups[0]["schedule"].lr_at(10, 2e-4) == pytest.approx(2e-5)


def test_from_a_gpu_the_host_learns_of_skips_when_a_copy_has_arrived(monkeypatch):
    optimizer = scheduled(max_grad_norm=1.0, backend="reference")
    counts, started = optimizer._counts, slow_arrivals(monkeypatch, counts_module)
    # what is done on a GPU when somebody asks, and not at every step
    ask = counts._take_arrived
    monkeypatch.setattr(counts, "refresh", lambda: None)
    steps(optimizer, 0, 2)
    ask()
    set_grads(optimizer, 2)
    spoil(optimizer)
    optimizer.step()
    # the host takes every step as made
    assert counts.k == [3] and len(started) == 1
    # on its way: no second copy is started
    ask()
    assert counts.k == [3] and len(started) == 1
    step(optimizer, 3)
    started[0].here = True
    ask()
    # it was started before the skip
    assert counts.k == [4] and len(started) == 2
    step(optimizer, 4)
    started[1].here = True
    ask()
    assert counts.k == [4] and len(started) == 3
    # one that was started before the host read the counters is not taken any more
    counts.sync()
    step(optimizer, 5)
    started[2].here = True
    ask()
    assert counts.k == [5] and len(started) == 4
