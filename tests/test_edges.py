"""Corners where a first user fell: each is a small promise of its own."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from snapshots import snapshot

import fusedlr


def parameters(n: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(n)]
    for p in params:
        p.grad = torch.full_like(p, 0.1)
    return params


@pytest.mark.parametrize("options", ({"max_grad_norm": 1.0}, {"nonfinite": "skip"}), ids=repr)
def test_a_norm_over_shards_is_refused(options: dict[str, Any]) -> None:
    params = parameters()
    # what FSDP sets on the parameters it shards
    params[1]._fsdp_flattened = True  # type: ignore[attr-defined]
    optimizer = fusedlr.FusedAdamW(params, **options)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0.*FSDP.*max_grad_norm=None"):
        optimizer.step()
    assert not optimizer.state
    fusedlr.FusedAdamW(params).step()


def test_an_infinite_limit_is_still_a_limit(device: str, backend: str) -> None:
    # clip_grad_norm_ divides inf by inf then, and every gradient is nan
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizer = fusedlr.FusedAdamW(params, max_grad_norm=math.inf, nonfinite="propagate", backend=backend)
    params[0].grad, params[1].grad = torch.ones_like(params[0]), torch.full_like(params[1], math.inf)
    optimizer.step()
    assert all(p.isnan().all() for p in params)
    assert optimizer.metrics()["coef"].isnan()


def test_a_square_that_overflows_does_not_stop_a_parameter() -> None:
    ours, theirs = parameters(1), parameters(1)
    for p in (*ours, *theirs):
        p.grad.fill_(3e19)
    fusedlr.FusedAdamW(ours, lr=1e-2).step()
    torch.optim.AdamW(theirs, lr=1e-2).step()
    assert torch.allclose(ours[0], theirs[0])


@pytest.mark.parametrize(
    ("key", "value"),
    (("eps", "x"), ("weight_decay", "x"), ("lr", torch.ones(2)), ("betas", (0.9, "x")), ("betas", (0.9,))),
)
def test_nonsense_in_a_running_group_changes_nothing(key: str, value: Any) -> None:
    first, second = parameters()
    optimizer = fusedlr.FusedAdamW([{"params": [first]}, {"params": [second]}], lr=0.1)
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[1][key] = value
    with pytest.raises(ValueError):
        optimizer.step()
    optimizer.param_groups[1][key] = optimizer.defaults[key]
    assert snapshot(optimizer) == before


@pytest.mark.parametrize(
    "bad", (torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.complex64)), ids=str
)
def test_a_moment_without_numbers_is_not_loaded(bad: torch.Tensor) -> None:
    optimizer = fusedlr.FusedAdamW(parameters(), lr=0.1)
    optimizer.step()
    other = fusedlr.FusedAdamW(parameters(), lr=0.1)
    other.step(), other.step()
    state_dict = other.state_dict()
    state_dict["state"][1] = {**state_dict["state"][1], "exp_avg_sq": bad}
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 1 of group 0.*its loaded exp_avg_sq"):
        optimizer.load_state_dict(state_dict)
    assert snapshot(optimizer) == before


def test_a_default_device_is_not_that_of_the_counters() -> None:
    params = parameters()
    with torch.device("meta"):
        optimizer = fusedlr.FusedAdamW(params, lr=0.1, schedule=fusedlr.linear(2, 10))
        optimizer.step()
        state_dict = optimizer.state_dict()
        optimizer.load_state_dict(state_dict)
    assert optimizer.last_metrics()["step"] == [1]


def test_moments_follow_a_model_made_fp64() -> None:
    model = torch.nn.Linear(3, 1)
    optimizer = fusedlr.FusedAdamW(model.parameters(), lr=0.1)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        model(torch.ones(2, 3, dtype=dtype)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float64}


def test_an_absolute_floor_is_measured_by_a_rate_that_is_used() -> None:
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters(), (2e-4, 3.2e-3), strict=True)]
    schedule = fusedlr.cosine(2, 10, min_lr=2e-5)
    with pytest.warns(UserWarning, match=r"min_lr=2e-05.* lr=0\.001.*0\.0002, 0\.0032"):
        fusedlr.FusedAdamW([dict(group) for group in groups], schedule=schedule)
    optimizer = fusedlr.FusedAdamW([dict(group) for group in groups], lr=2e-4, schedule=schedule)
    assert optimizer.param_groups[0]["schedule"].lr_at(10, 2e-4) == pytest.approx(2e-5)


def run_to(step: int) -> dict[str, Any]:
    optimizer = fusedlr.FusedAdamW(parameters(), lr=0.1, schedule=fusedlr.linear(2, 50))
    for _ in range(step):
        optimizer.step()
    return optimizer.state_dict()


def test_a_loaded_scheduler_state_overrides_one_load() -> None:
    optimizer = fusedlr.FusedAdamW(parameters(), lr=0.1, schedule=fusedlr.linear(2, 50))
    optimizer.scheduler.load_state_dict({"last_epoch": 5})
    optimizer.load_state_dict(run_to(7))
    assert optimizer.scheduler.last_epoch == 5
    optimizer.load_state_dict(run_to(20))
    assert optimizer.scheduler.last_epoch == 20


def test_a_file_without_a_peak_leaves_ours() -> None:
    stock = torch.optim.AdamW(parameters(), lr=0.0)
    stock.step()
    optimizer = fusedlr.FusedAdamW(parameters(), lr=0.1, schedule=fusedlr.linear(4, 10))
    optimizer.load_state_dict(stock.state_dict())
    assert optimizer.param_groups[0]["initial_lr"] == 0.1


def test_the_peak_of_a_one_cycle_run_is_its_max_lr() -> None:
    stock = torch.optim.AdamW(parameters(), lr=0.1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(stock, max_lr=0.1, total_steps=20, cycle_momentum=False)
    schedule = fusedlr.from_torch(cycle, 20)
    for _ in range(5):
        stock.step()
        cycle.step()
    optimizer = fusedlr.FusedAdamW(parameters(), lr=0.1, schedule=schedule)
    optimizer.load_state_dict(stock.state_dict())
    assert optimizer.scheduler.get_last_lr() == pytest.approx(cycle.get_last_lr())


def test_the_view_says_that_it_cannot_be_driven() -> None:
    optimizer = fusedlr.FusedAdamW(parameters(), lr=0.1, schedule=fusedlr.linear(2, 10))
    other = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    with pytest.raises(AttributeError, match="schedule=None"):
        torch.optim.lr_scheduler.SequentialLR(optimizer, [optimizer.scheduler, other], milestones=[3])


@pytest.mark.parametrize("share", (0.1, np.float32(0.1), np.float64(0.1)), ids=type)
def test_any_kind_of_number_is_a_share(share: float) -> None:
    assert fusedlr.linear(share, 1000).phases[0].end in (100, 101)


def test_scheduler_state_is_that_of_the_updates_made_when_the_host_ran_ahead() -> None:
    optimizer = fusedlr.FusedAdamW(parameters(), lr=0.1, schedule=fusedlr.linear(0, 10))
    for _ in range(6):
        optimizer.step()
    # on a GPU the host learns of skips late: four of these steps were none
    optimizer._counters.k.fill_(2)
    state = optimizer.scheduler.state_dict()
    assert (state["k"], state["last_epoch"]) == ([2], 2)
    assert state["_last_lr"] == pytest.approx([0.08])


def test_a_table_is_uploaded_once_and_old_ones_are_let_go() -> None:
    optimizer = fusedlr.FusedAdamW(parameters(), lr=0.1, schedule=fusedlr.constant())
    for i in range(200):
        optimizer.param_groups[0]["schedule"] = fusedlr.table([1.0, 1.0 / (i + 1)])
        optimizer.step()
        optimizer.step()
    assert len(optimizer._counters.math._tables) <= 64
    assert math.isclose(optimizer.last_metrics()["lr"][0], 0.1 / 200)


def test_messages_have_no_leftover_formatting() -> None:
    with pytest.raises(ValueError) as error:
        fusedlr.cosine(total_steps=10, min_lr_ratio=2)
    assert not re.search(r"[{}]", str(error.value))
