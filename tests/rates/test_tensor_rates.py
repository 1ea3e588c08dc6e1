"""Rates that are tensors are read at every step, and refused where a schedule is to drive them."""

from __future__ import annotations

import pytest
import torch
from kit import PEAK, SCHEDULE, assert_same, make, make_params, make_stock, step
from snapshots import unchanged

import fusedlr


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_rate_is_read_at_every_step(shape):
    lr = torch.full(shape, PEAK)
    ours = fusedlr.FusedAdamW(make_params(), lr=lr)
    stock = make_stock(lr=float(torch.tensor(PEAK)))
    step(ours, 0)
    step(stock, 0)
    # in place: nothing is assigned, and the tensor is the one that was passed
    lr.fill_(0.25)
    stock.param_groups[0]["lr"] = 0.25
    step(ours, 1)
    step(stock, 1)
    assert ours.param_groups[0]["lr"] is lr
    assert ours.scheduler.get_last_lr() == [0.25]
    assert_same(ours, stock)


def test_another_tensor_takes_the_place_of_a_rate():
    ours, stock = make(lr=torch.tensor(PEAK)), make_stock(lr=float(torch.tensor(PEAK)))
    for k, rate in enumerate((PEAK, 0.25)):
        ours.param_groups[0]["lr"] = torch.tensor(rate)
        stock.param_groups[0]["lr"] = float(torch.tensor(rate))
        step(ours, k)
        step(stock, k)
    assert_same(ours, stock)


def test_groups_may_differ_in_tensor_rates():
    a, b, *_ = make_params()
    optimizer = fusedlr.FusedAdamW([{"params": [a], "lr": torch.tensor(0.25)}, {"params": [b]}], lr=PEAK)
    step(optimizer, 0)
    assert optimizer.metrics()["lr"].tolist() == [0.25, PEAK]


def test_a_schedule_with_a_tensor_rate_is_refused():
    with pytest.raises(ValueError, match=r"lr=tensor\(0\.05.*is a tensor, which a schedule cannot drive"):
        fusedlr.FusedAdamW(make_params(), lr=torch.tensor(PEAK), schedule=SCHEDULE)
    a, b, *_ = make_params()
    groups = [{"params": [a]}, {"params": [b], "lr": torch.tensor([0.25])}]
    with pytest.raises(ValueError, match=r"lr=tensor\(\[0\.25.*is a tensor, which a schedule cannot drive"):
        fusedlr.FusedAdamW(groups, lr=PEAK, schedule=SCHEDULE)
    optimizer = fusedlr.FusedAdamW([a], lr=torch.tensor(PEAK))
    with unchanged(optimizer), pytest.raises(ValueError, match="is a tensor, which a schedule cannot drive"):
        optimizer.add_param_group({"params": [b], "schedule": SCHEDULE})


@pytest.mark.parametrize("shape", [(2,), (0,), (1, 3)])
def test_a_tensor_rate_of_several_elements_is_refused(shape):
    with pytest.raises(ValueError, match=r"lr has shape .*, a tensor lr must have one element"):
        fusedlr.FusedAdamW(make_params(), lr=torch.ones(shape))
