"""What is in the state: torch AdamW's keys, types and values, and nothing that `weights_only` refuses."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from kit import (
    PEAK,
    SCHEDULE,
    assert_same,
    assert_steps_share_one_tensor,
    copied,
    make,
    make_params,
    make_stock,
    scheduled,
    step,
    steps,
    through_a_file,
    torchs_part,
)
from snapshots import bits, params_of, unchanged

import fusedlr

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all": {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "foreach": {"foreach": True},
    "not foreach": {"foreach": False},
    "fused": {"fused": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("stepped", [False, True])
def test_without_a_schedule_the_state_dict_is_adamws_key_for_key(name, stepped):
    ours = fusedlr.FusedAdamW(make_params(), **OPTIONS[name])
    stock = torch.optim.AdamW(make_params(), **OPTIONS[name])
    if stepped:
        for optimizer in (ours, stock):
            steps(optimizer, 0, 2)
    mine, theirs = ours.state_dict(), stock.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert list(mine["param_groups"][0]) == list(theirs["param_groups"][0])
    assert mine["state"].keys() == theirs["state"].keys()
    for i, entry in theirs["state"].items():
        assert mine["state"][i].keys() == entry.keys()
        for key, value in entry.items():
            got = mine["state"][i][key]
            assert type(got) is type(value)
            assert (got.dtype, got.shape, got.device) == (value.dtype, value.shape, value.device)


def test_a_group_keeps_what_torch_would_keep():
    a, b, c, _ = make_params()
    groups = [
        {"params": [a], "lr": 0.3, "note": "mine"},
        {"params": [b, c], "betas": (0.5, 0.6), "eps": 1e-3},
    ]
    ours = fusedlr.FusedAdamW([dict(group) for group in groups])
    stock = torch.optim.AdamW([dict(group) for group in groups])
    assert torchs_part(ours.state_dict()) == stock.state_dict()


def test_the_first_rate_that_a_torch_scheduler_notes_is_an_option_of_the_group():
    ours, stock = make(), make_stock()
    for each in (ours, stock):
        torch.optim.lr_scheduler.LambdaLR(each, lambda k: 0.5)
    assert torchs_part(ours.state_dict()) == stock.state_dict()
    again = make()
    again.load_state_dict(ours.state_dict())
    assert torchs_part(again.state_dict()) == stock.state_dict()


def test_a_schedule_adds_plain_numbers_beside_the_groups_alone():
    ours, stock = scheduled(), make_stock()
    steps(ours, 0, 2)
    saved = ours.state_dict()
    assert saved.keys() - stock.state_dict().keys() == {"fusedlr"}
    assert saved["param_groups"][0].keys() == stock.state_dict()["param_groups"][0].keys()
    assert saved["fusedlr"]["format"] == 2
    (group,) = saved["fusedlr"]["groups"]
    assert group.pop("schedule") == SCHEDULE.to_numbers()
    assert all(type(number) in (int, float) for number in SCHEDULE.to_numbers())
    assert group == {"peak": PEAK, "k": 2, "k_at_step": 2, "skipped": 0}


def test_groups_hold_torchs_options_alone():
    """Tools save, compare and copy the items of a group, and some can hold plain values only."""
    ours, stock = scheduled(), make_stock()
    group = ours.param_groups[0]
    assert group.keys() == stock.param_groups[0].keys()
    json.dumps({key: value for key, value in group.items() if key != "params"})
    assert (group["schedule"], group["initial_lr"], group["k"]) == (SCHEDULE, PEAK, 0)
    assert group.get("schedule") == SCHEDULE and "schedule" in group
    assert group.setdefault("initial_lr", 7.0) == PEAK
    for copied_group in (dict(group), copy.deepcopy(group), copy.copy(group), {**group}):
        assert type(copied_group) is dict and "schedule" not in copied_group
    assert "schedule" in repr(ours) or "linear(" in repr(ours)
    group.update(schedule=fusedlr.constant())
    assert group["schedule"] == fusedlr.constant() and "schedule" not in group.keys()  # noqa: SIM118
    assert group.pop("schedule") == fusedlr.constant()
    assert "schedule" not in group


def test_a_state_dict_holds_only_what_weights_only_loads():
    optimizer = scheduled(make_params((torch.float32, torch.bfloat16)), amsgrad=True, max_grad_norm=1.0)
    steps(optimizer, 0, 2)
    loaded = through_a_file(optimizer.state_dict())
    assert bits(loaded) == bits(optimizer.state_dict())
    # a string here breaks torch.distributed.checkpoint
    assert all(type(key) is int for key in loaded["state"])


def test_saving_twice_gives_the_same():
    optimizer = scheduled()
    steps(optimizer, 0, 3)
    with unchanged(optimizer):
        assert bits(optimizer.state_dict()) == bits(optimizer.state_dict())


def test_every_step_is_a_view_into_one_tensor():
    params = make_params((torch.float64, torch.bfloat16))
    optimizer = scheduled(params)
    steps(optimizer, 0, 2, missing=lambda k, i: i % 2 == k)
    assert_steps_share_one_tensor(optimizer)
    optimizer.add_param_group({"params": make_params()})
    # also those that have no gradient when all views are made anew
    steps(optimizer, 2, 3, missing=lambda k, i: i in (1, 4))
    assert_steps_share_one_tensor(optimizer)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    steps(optimizer, 3, 4)
    assert_steps_share_one_tensor(optimizer)
    optimizer.state[params[0]]["step"] = torch.tensor(9.0)
    steps(optimizer, 4, 5)
    assert_steps_share_one_tensor(optimizer)
    assert optimizer.state[params[0]]["step"] == 10


def test_a_parameter_without_a_gradient_has_no_state_and_stays():
    optimizer, stock = make(), make_stock()
    for each in (optimizer, stock):
        steps(each, 0, 5, missing=lambda k, i: i == 1 or (k + i) % 3 == 0)
    assert params_of(optimizer)[1] not in optimizer.state
    assert optimizer.state_dict()["state"].keys() == stock.state_dict()["state"].keys()
    assert_same(optimizer, stock)


def test_moments_that_torch_narrowed_are_widened_again():
    stock = make_stock(make_params((torch.bfloat16,)))
    steps(stock, 0, 2)
    ours = make(copied(params_of(stock)))
    ours.load_state_dict(stock.state_dict())
    for p, q in zip(params_of(ours), params_of(stock), strict=True):
        assert ours.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(ours.state[p]["exp_avg"], stock.state[q]["exp_avg"].float())


def test_moments_in_the_parameters_dtype_if_asked_for():
    optimizer = scheduled(make_params((torch.bfloat16, torch.float32)), state_dtype="param")
    steps(optimizer, 0, 2)
    assert all(optimizer.state[p]["exp_avg_sq"].dtype == p.dtype for p in params_of(optimizer))


def test_moments_that_are_wider_than_asked_for_stay_so():
    wide = make(make_params((torch.bfloat16,)))
    steps(wide, 0, 2)
    optimizer = make(copied(params_of(wide)), state_dtype="param")
    optimizer.load_state_dict(wide.state_dict())
    for each in (wide, optimizer):
        step(each, 2)
    for p, q in zip(params_of(optimizer), params_of(wide), strict=True):
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(optimizer.state[p]["exp_avg"], wide.state[q]["exp_avg"])
