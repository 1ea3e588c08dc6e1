"""Gradients that are not finite, without a scaler: skipped or propagated, by group or jointly; counted."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from kit import SCHEDULE, make_params, make_stock, mixed, recorded, set_grads, skipped, spoil, step
from snapshots import bits, changes, params_of, snapshot
from torch import nn

import fusedlr


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 1.0}, {"nonfinite": "skip"}], ids=["clip", "asked for"]
)
@pytest.mark.parametrize("index", [0, 2, 5])
def test_a_gradient_that_is_not_finite_skips(device, backend, options, value, index):
    optimizer = mixed(device, backend, **options)
    assert optimizer.nonfinite == "skip"
    step(optimizer, 0)
    optimizer.scheduler.step()
    set_grads(optimizer, 1)
    spoil(optimizer, value, index)
    before = snapshot(optimizer)
    optimizer.step()
    assert changes(before, snapshot(optimizer)) == ["skipped"]
    assert not math.isfinite(optimizer.metrics()["grad_norm"])


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_propagate_is_torch(device, backend, value, max_grad_norm):
    ours = mixed(device, backend, max_grad_norm=max_grad_norm, nonfinite="propagate", schedule=None)
    assert ours.nonfinite == "propagate"
    stock = make_stock(make_params((torch.float32, torch.bfloat16), device=device))
    for optimizer in (ours, stock):
        set_grads(optimizer, 0)
        spoil(optimizer, value)
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(params_of(stock), max_grad_norm)
    ours.step()
    stock.step()
    for p, q in zip(params_of(ours), params_of(stock), strict=True):
        assert torch.equal(p.isnan(), q.isnan())
        assert torch.equal(ours.state[p]["exp_avg"].isfinite(), stock.state[q]["exp_avg"].isfinite())
    assert skipped(ours) == 0
    assert ours.metrics()["step"].tolist() == [1]


def test_without_clipping_nothing_is_skipped_by_default():
    optimizer = mixed(schedule=None)
    assert optimizer.nonfinite == "propagate"
    set_grads(optimizer, 0)
    spoil(optimizer)
    optimizer.step()
    assert params_of(optimizer)[0].isnan().any()
    assert math.isnan(optimizer.metrics()["grad_norm"])


def test_a_norm_that_overflows_counts_as_not_finite(device, backend):
    optimizer = mixed(device, backend, max_grad_norm=1.0)
    set_grads(optimizer, 0)
    # finite, but its square is not, in fp32
    spoil(optimizer, 1e30)
    before = snapshot(optimizer)
    optimizer.step()
    assert changes(before, snapshot(optimizer)) == ["state", "skipped"]
    assert optimizer.metrics()["grad_norm"] == math.inf


def test_a_norm_that_overflows_is_clipped_to_nothing_by_propagate(device, backend):
    """As `clip_grad_norm_` does: 1 over an infinite norm is 0."""
    ours = mixed(device, backend, max_grad_norm=1.0, nonfinite="propagate", schedule=None, weight_decay=0.0)
    set_grads(ours, 0)
    spoil(ours, 1e30)
    before = [bits(p) for p in params_of(ours)]
    ours.step()
    assert ours.metrics()["coef"] == 0
    assert [bits(p) for p in params_of(ours)] == before
    assert skipped(ours) == 0


def test_a_large_fp64_gradient_is_no_overflow():
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = fusedlr.FusedAdamW([p], lr=0.1, max_grad_norm=1.0)
    p.grad = torch.full_like(p, 1e100)
    optimizer.step()
    assert skipped(optimizer) == 0
    assert optimizer.metrics()["grad_norm"].item() == pytest.approx(math.sqrt(3) * 1e100)


def test_an_unscaled_gradient_that_fits_is_no_overflow(device, backend):
    """The norm is that of the unscaled gradients: scaled ones may be far too large to square."""
    optimizer = mixed(device, backend, max_grad_norm=1.0)
    set_grads(optimizer, 0, scale=2.0**80)
    optimizer.grad_scale = torch.tensor(2.0**80, device=device)
    optimizer.step()
    assert skipped(optimizer) == 0


def overflow(optimizer: fusedlr.FusedAdamW, times: int) -> list[warnings.WarningMessage]:
    with recorded() as caught:
        for _ in range(times):
            set_grads(optimizer, 0)
            spoil(optimizer)
            optimizer.step()
            optimizer.last_metrics()
    return caught


def test_ten_skips_in_a_row_warn_once():
    optimizer = mixed(max_grad_norm=1.0)
    assert overflow(optimizer, 9) == []
    (warning,) = overflow(optimizer, 1)
    assert "10 optimizer steps in a row were skipped" in str(warning.message)
    assert "gradient norm inf" in str(warning.message) and "scope" not in str(warning.message)
    assert warning.filename == __file__
    assert overflow(optimizer, 25) == []
    assert skipped(optimizer) == 35


def test_a_step_that_is_made_ends_the_row():
    optimizer = mixed(max_grad_norm=1.0)
    for _ in range(3):
        assert overflow(optimizer, 9) == []
        set_grads(optimizer, 0)
        optimizer.step()
    assert skipped(optimizer) == 27


def independent(device: str = "cpu", backend: str = "auto", **options) -> fusedlr.FusedAdamW:
    params = make_params((torch.float32,), device=device)
    groups = [{"params": params[:2]}, {"params": params[2:], "max_grad_norm": 0.5}]
    return fusedlr.FusedAdamW(
        groups,
        lr=0.05,
        schedule=SCHEDULE,
        groups="independent",
        max_grad_norm=1.0,
        backend=backend,
        **options,
    )


def test_independent_groups_skip_alone(device, backend):
    spoiled, whole = independent(device, backend), independent(device, backend)
    for optimizer in (spoiled, whole):
        set_grads(optimizer, 0)
        optimizer.step()
        set_grads(optimizer, 1)
    spoil(spoiled)
    before = snapshot(spoiled, lr=False)
    spoiled.step()
    whole.step()
    after, other = snapshot(spoiled, lr=False), snapshot(whole, lr=False)
    assert after["params"][:2] == before["params"][:2]
    assert after["state"][:2] == before["state"][:2]
    assert after["params"][2:] == other["params"][2:] != before["params"][2:]
    assert after["state"][2:] == other["state"][2:]
    assert spoiled.metrics()["skipped"].tolist() == [1, 0]
    assert spoiled.metrics()["step"].tolist() == [1, 2]
    assert spoiled.last_metrics()["skipped"] == [1, 0]


def test_a_scalers_flag_skips_all_independent_groups_without_a_norm_that_had_gradients(device, backend):
    optimizer = independent(device, backend)
    optimizer.max_grad_norm = optimizer.param_groups[1]["max_grad_norm"] = None
    set_grads(optimizer, 0)
    for p in optimizer.param_groups[1]["params"]:
        p.grad = None
    before = snapshot(optimizer, lr=False)
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    assert snapshot(optimizer, lr=False)["params"] == before["params"]
    assert optimizer.metrics()["skipped"].tolist() == [1, 0]
    assert optimizer.metrics()["step"].tolist() == [0, 0]


def test_joint_groups_skip_together(device, backend):
    params = make_params((torch.float32, torch.bfloat16), device=device)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}, {"params": []}]
    optimizer = fusedlr.FusedAdamW(groups, lr=0.05, schedule=SCHEDULE, max_grad_norm=1.0, backend=backend)
    set_grads(optimizer, 0)
    spoil(optimizer, index=6)
    before = snapshot(optimizer)
    optimizer.step()
    assert changes(before, snapshot(optimizer)) == ["state", "skipped"]
    assert optimizer.metrics()["step"].tolist() == [0, 0, 0]
    assert skipped(optimizer) == 1


def test_an_infinite_limit_is_still_a_limit(device, backend):
    # clip_grad_norm_ divides inf by inf then, and every gradient is nan
    optimizer = mixed(device, backend, max_grad_norm=math.inf, nonfinite="propagate")
    set_grads(optimizer)
    spoil(optimizer, index=5)
    optimizer.step()
    assert all(p.isnan().all() for p in params_of(optimizer))
    assert optimizer.metrics()["coef"].isnan()
