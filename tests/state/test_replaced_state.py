"""State that others replace, clear or spoil between two steps, and groups that come and go."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import (
    PEAK,
    SCHEDULE,
    assert_same,
    assert_steps_share_one_tensor,
    make,
    make_params,
    make_stock,
    scheduled,
    set_grads,
    steps,
    through_a_file,
    two_groups,
)
from snapshots import params_of, snapshot
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import fusedlr

# done to the state of a parameter between two steps
REPLACED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "step by a tensor": lambda entry: entry.update(step=torch.tensor(7.0)),
    "step by a vector": lambda entry: entry.update(step=torch.tensor([7.0])),
    "step by a number": lambda entry: entry.update(step=7),
    "step in place": lambda entry: entry["step"].fill_(7),
    "moments": lambda entry: entry.update(
        exp_avg=entry["exp_avg"] * 2, exp_avg_sq=(entry["exp_avg_sq"] + 1).clone()
    ),
    "a moment by one of other strides": lambda entry: entry.update(
        exp_avg=entry["exp_avg"].t().contiguous().t()
    ),
}


@pytest.mark.parametrize("name", REPLACED)
def test_entries_replaced_from_outside_are_adopted(name):
    ours, stock = make(), make_stock()
    for optimizer in (ours, stock):
        steps(optimizer, 0, 2)
        REPLACED[name](optimizer.state[params_of(optimizer)[0]])
    # torch has no use for these
    entry = stock.state[params_of(stock)[0]]
    entry["step"] = torch.as_tensor(entry["step"], dtype=torch.float32).reshape(())
    for optimizer in (ours, stock):
        steps(optimizer, 2, 4)
    assert_same(ours, stock)
    assert_steps_share_one_tensor(ours)


def test_a_whole_entry_may_be_replaced():
    ours, stock = make(), make_stock()
    for optimizer in (ours, stock):
        steps(optimizer, 0, 2)
        optimizer.state[params_of(optimizer)[1]] = copy.deepcopy(optimizer.state[params_of(optimizer)[1]])
        steps(optimizer, 2, 4)
    assert_same(ours, stock)


CLEARED: dict[str, Callable[[Optimizer], Any]] = {
    "all": lambda optimizer: optimizer.state.clear(),
    "all by another mapping": lambda optimizer: setattr(optimizer, "state", defaultdict(dict)),
    "one": lambda optimizer: optimizer.state.pop(params_of(optimizer)[0]),
    "one by an empty entry": lambda optimizer: optimizer.state[params_of(optimizer)[0]].clear(),
}


@pytest.mark.parametrize("name", CLEARED)
def test_cleared_state_starts_anew_and_the_schedule_goes_on(name):
    ours, stock = scheduled(), make_stock()
    foreign = LambdaLR(stock, SCHEDULE.lr_at)
    for k in range(6):
        if k == 3:
            CLEARED[name](ours)
            CLEARED[name](stock)
        for optimizer in (ours, stock):
            set_grads(optimizer, k)
            optimizer.step()
        foreign.step()
    assert_same(ours, stock)
    assert ours.metrics()["step"].tolist() == [6]
    assert_steps_share_one_tensor(ours)


def freed() -> torch.Tensor:
    x = torch.ones(4, 3)
    x.untyped_storage().resize_(0)
    return x


ONES = torch.ones(4, 3)
MOMENTS: list[tuple[Callable[[], Any], str]] = [
    (lambda: torch.zeros(3), "its {} has shape (3,) but the parameter has (4, 3)"),
    (lambda: torch.zeros(4, 3, device="meta"), "its {} is on meta but the parameter is on cpu"),
    (lambda: [1.0], "its {} is a list, expected a tensor"),
    (lambda: torch.zeros(1).expand(4, 3), "its {} has elements that share memory, stride (0, 0)"),
    (lambda: ONES.to_sparse(), "its {} is of layout torch.sparse_coo, expected a dense tensor"),
    (lambda: ONES.to(torch.complex64), "its {} is torch.complex64, expected a floating point number"),
    (lambda: ONES.to(torch.float8_e4m3fn), "its {} is torch.float8_e4m3fn, expected"),
    (lambda: torch.quantize_per_tensor(ONES, 0.1, 0, torch.qint8), "its {} is torch.qint8, expected"),
    (freed, "the memory of its {} has been freed"),
]
MISFITS: list[tuple[str, Callable[[], Any], str]] = [
    *((key, value, message.format(key)) for key in ("exp_avg", "exp_avg_sq") for value, message in MOMENTS),
    ("step", lambda: torch.zeros(2), "its step has shape (2,), expected one element"),
    ("step", lambda: "three", "its step is 'three', expected a number"),
]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("key", "value", "message"), MISFITS, ids=[message for _, _, message in MISFITS])
@pytest.mark.filterwarnings("ignore")
def test_state_that_does_not_fit_its_parameter_is_refused_before_anything_changes(
    key, value, message, backend
):
    p, q = make_params((torch.float32,), shapes=((2,), (4, 3)))
    optimizer = scheduled([("first", p), ("second", q)], backend=backend)
    steps(optimizer, 0, 2)
    set_grads(optimizer)
    before, good = snapshot(optimizer), optimizer.state[q][key]
    optimizer.state[q][key] = value()
    with pytest.raises(RuntimeError, match=re.escape(f"parameter 'second': {message}")):
        optimizer.step()
    # not all that is spoiled can be read
    optimizer.state[q][key] = good
    assert snapshot(optimizer) == before
    # and with a good one it goes on
    optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [3]
    assert [float(optimizer.state[x]["step"]) for x in (p, q)] == [3, 3]


@pytest.mark.parametrize("schedule", [None, fusedlr.constant()], ids=str)
def test_a_group_added_in_mid_run_is_trained_as_by_torch(schedule):
    ours, stock = make(schedule=schedule), make_stock()
    for optimizer in (ours, stock):
        steps(optimizer, 0, 3)
        added = {"params": make_params(shapes=((6,), (2, 2))), "lr": 0.3, "weight_decay": 0.4}
        optimizer.add_param_group(added)
        steps(optimizer, 3, 6)
    assert_same(ours, stock)


def test_the_schedule_of_an_added_group_starts_at_its_beginning():
    optimizer = scheduled()
    steps(optimizer, 0, 4)
    optimizer.add_param_group({"params": make_params(shapes=((6,),)), "lr": 1.0})
    assert optimizer.scheduler.get_last_lr() == [SCHEDULE.lr_at(3, PEAK), SCHEDULE.lr_at(0, 1.0)]
    steps(optimizer, 4, 6)
    assert optimizer.metrics()["step"].tolist() == [6, 2]
    assert optimizer.scheduler.get_last_lr() == [SCHEDULE.lr_at(5, PEAK), SCHEDULE.lr_at(1, 1.0)]
    state = through_a_file(optimizer.state_dict())
    fresh = scheduled()
    fresh.add_param_group({"params": make_params(shapes=((6,),)), "lr": 1.0})
    fresh.load_state_dict(state)
    assert fresh.metrics()["step"].tolist() == [6, 2]
    assert fresh.scheduler.get_last_lr() == [SCHEDULE.lr_at(6, PEAK), SCHEDULE.lr_at(2, 1.0)]


def test_a_group_may_be_taken_away():
    optimizer = two_groups()
    steps(optimizer, 0, 2)
    for p in optimizer.param_groups.pop()["params"]:
        # torch refuses to save the state of a parameter that has gone
        del optimizer.state[p]
    steps(optimizer, 2, 4)
    assert optimizer.metrics()["step"].tolist() == [4]
    assert len(optimizer.state_dict()["param_groups"]) == 1
    assert len(optimizer.scheduler.state_dict()["k"]) == 1
    optimizer.add_param_group({"params": make_params(shapes=((6,),))})
    steps(optimizer, 4, 5)
    assert optimizer.metrics()["step"].tolist() == [5, 1]
