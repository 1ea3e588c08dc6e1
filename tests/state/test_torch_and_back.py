"""A run goes on under torch's AdamW and LambdaLR and comes back, at any step."""

from __future__ import annotations

import pytest
import torch
from kit import (
    PEAK,
    SCHEDULE,
    assert_same,
    copied,
    make,
    make_params,
    make_stock,
    scheduled,
    set_grads,
    silent,
    step,
    steps,
    through_a_file,
)
from snapshots import params_of
from torch.optim.lr_scheduler import LambdaLR

import fusedlr


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.0}], ids=str)
def test_a_run_may_change_to_torch_and_back(options):
    whole = make_stock(**options)
    steps(whole, 0, 9)
    ours = make(**options)
    steps(ours, 0, 3)
    stock = make_stock(copied(params_of(ours)), **options)
    stock.load_state_dict(through_a_file(ours.state_dict()))
    steps(stock, 3, 6)
    again = make(copied(params_of(stock)), **options)
    again.load_state_dict(through_a_file(stock.state_dict()))
    steps(again, 6, 9)
    assert_same(again, whole)
    assert again.metrics()["step"].tolist() == [9]


def test_a_scheduled_run_may_change_to_torch_and_back():
    whole = scheduled()
    steps(whole, 0, 9)
    ours = scheduled()
    steps(ours, 0, 3)
    ours.scheduler.step()

    stock = make_stock(copied(params_of(ours)))
    foreign = LambdaLR(stock, lambda k: SCHEDULE.lr_at(k))
    stock.load_state_dict(through_a_file(ours.state_dict()))
    foreign.load_state_dict(through_a_file(ours.scheduler.state_dict()))
    for k in range(3, 6):
        set_grads(stock, k)
        stock.step()
        foreign.step()

    state = through_a_file(stock.state_dict())
    again = scheduled(copied(params_of(stock)))
    with silent():
        again.load_state_dict(state)
    assert again.metrics()["step"].tolist() == [6]
    assert again.scheduler.get_last_lr() == [SCHEDULE.lr_at(6, PEAK)]
    again.scheduler.load_state_dict(through_a_file(foreign.state_dict()))
    assert again.scheduler.last_epoch == 6
    steps(again, 6, 9)
    assert_same(again, whole)


def test_a_run_that_began_with_torch_is_taken_over():
    stock = make_stock()
    foreign = LambdaLR(stock, SCHEDULE.lr_at)
    for k in range(4):
        set_grads(stock, k)
        stock.step()
        foreign.step()
    ours = scheduled(copied(params_of(stock)))
    with silent():
        ours.load_state_dict(through_a_file(stock.state_dict()))
    steps(ours, 4, 8)
    whole = scheduled()
    steps(whole, 0, 8)
    assert_same(ours, whole)


def test_a_detour_through_torch_counts_the_updates_of_the_run():
    """Stock AdamW's file says how often each tensor was updated, and all joint groups go on at the most."""
    ours = scheduled()
    steps(ours, 0, 4)
    ours.add_param_group({"params": make_params()})
    steps(ours, 4, 6)
    assert ours.metrics()["step"].tolist() == [6, 2]
    stock = make_stock(copied(params_of(ours)[:4]))
    stock.add_param_group({"params": copied(params_of(ours)[4:])})
    stock.load_state_dict(ours.state_dict())
    steps(stock, 6, 8)
    again = scheduled(copied(params_of(stock)[:4]))
    again.add_param_group({"params": copied(params_of(stock)[4:])})
    again.load_state_dict(stock.state_dict())
    assert again.metrics()["step"].tolist() == [8, 8]


def test_a_groups_own_clipping_survives_a_state_of_torch():
    def build() -> fusedlr.FusedAdamW:
        a, b, *_ = make_params()
        groups = [{"params": [a], "max_grad_norm": 1e-3}, {"params": [b]}]
        return fusedlr.FusedAdamW(groups, lr=PEAK, groups="independent")

    a, b, *_ = make_params()
    stock = torch.optim.AdamW([{"params": [a]}, {"params": [b]}], lr=PEAK)
    steps(stock, 0, 1)
    optimizer = build()
    optimizer.load_state_dict(stock.state_dict())
    steps(optimizer, 1, 2)
    assert optimizer.metrics()["coef"].tolist() == [pytest.approx(0, abs=1e-2), 1.0]


def test_entries_of_no_parameter_are_kept_as_torch_keeps_them():
    source = make_stock()
    steps(source, 0, 1)
    state = source.state_dict()
    state["state"]["note"], state["state"]["count"] = {"a": 1}, 5
    optimizer = make()
    for _ in range(2):
        optimizer.load_state_dict(state)
        assert (optimizer.state["note"], optimizer.state["count"]) == ({"a": 1}, 5)
        steps(optimizer, 1, 2)
    assert optimizer.state_dict()["state"]["note"] == {"a": 1}


def test_a_file_without_a_peak_leaves_ours():
    stock = torch.optim.AdamW(make_params(), lr=0.0)
    step(stock)
    optimizer = fusedlr.FusedAdamW(make_params(), lr=0.1, schedule=fusedlr.linear(4, 10))
    optimizer.load_state_dict(stock.state_dict())
    assert optimizer.param_groups[0]["initial_lr"] == 0.1


def test_the_peak_of_a_one_cycle_run_is_its_max_lr():
    stock = torch.optim.AdamW(make_params(), lr=0.1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(stock, max_lr=0.1, total_steps=20, cycle_momentum=False)
    schedule = fusedlr.from_torch(cycle, 20)
    for _ in range(5):
        step(stock)
        cycle.step()
    optimizer = fusedlr.FusedAdamW(make_params(), lr=0.1, schedule=schedule)
    optimizer.load_state_dict(stock.state_dict())
    assert optimizer.scheduler.get_last_lr() == pytest.approx(cycle.get_last_lr())
