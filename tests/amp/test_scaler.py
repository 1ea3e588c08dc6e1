"""A GradScaler drives the optimizer: scales, overflows, and the protocol switched off."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from kit import PEAK, SCHEDULE, make_params, make_stock, mixed, scheduled, set_grads, skipped, spoil, step
from snapshots import bits, changes, params_of, snapshot
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR


def scaler_for(device: str, scale: float = 1024.0) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler(device, init_scale=scale)
    # a scaler makes its scale at the first loss it sees
    scaler.scale(torch.zeros((), device=device))
    return scaler


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_scaled_run_gives_the_bits_of_an_unscaled_one(device, backend, max_grad_norm, unscale_first):
    plain = mixed(device, backend, max_grad_norm=max_grad_norm)
    scaled = mixed(device, backend, max_grad_norm=max_grad_norm)
    scaler = scaler_for(device)
    for k in range(6):
        set_grads(plain, k)
        plain.step()
        set_grads(scaled, k, scale=1024.0)
        if unscale_first:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        assert scaler.get_scale() == 1024.0
        assert bits(scaled.metrics()["grad_norm"]) == bits(plain.metrics()["grad_norm"])
    left_out = "grads" if not unscale_first else ""
    assert set(changes(snapshot(plain), snapshot(scaled))) <= {left_out}


def test_gradients_stay_as_they_were(device, backend):
    optimizer = mixed(device, backend, max_grad_norm=0.1)
    set_grads(optimizer, 0, scale=1024.0)
    before = [bits(p.grad) for p in params_of(optimizer)]
    scaler_for(device).step(optimizer)
    assert [bits(p.grad) for p in params_of(optimizer)] == before
    assert optimizer.metrics()["coef"] < 1


@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_grad_scale_set_by_the_user_multiplies_the_scalers(device, backend, unscale_first):
    plain, scaled = mixed(device, backend, max_grad_norm=1.0), mixed(device, backend, max_grad_norm=1.0)
    step(plain, 0)
    scaler = scaler_for(device, 256.0)
    set_grads(scaled, 0, scale=4.0 * 256.0)
    scaled.grad_scale = torch.tensor(4.0, device=device)
    if unscale_first:
        scaler.unscale_(scaled)
    scaler.step(scaled)
    assert set(changes(snapshot(plain), snapshot(scaled))) <= {"grads"}
    # the scaler takes both attributes away, and the next step is an unscaled one
    assert not hasattr(scaled, "grad_scale") and not hasattr(scaled, "found_inf")


@pytest.mark.parametrize("scale", [8.0, 8, torch.tensor(8.0), torch.tensor([8.0]), torch.tensor(8), None])
def test_a_grad_scale_may_be_any_single_number(device, backend, scale):
    plain, scaled = mixed(device, backend), mixed(device, backend)
    step(plain, 0)
    set_grads(scaled, 0, scale=1.0 if scale is None else 8.0)
    scaled.grad_scale = scale.to(device) if isinstance(scale, Tensor) else scale
    scaled.step()
    assert set(changes(snapshot(plain), snapshot(scaled))) <= {"grads"}


def test_a_disabled_scaler_changes_nothing():
    plain, scaled = mixed(), mixed()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for optimizer in (plain, scaled):
        set_grads(optimizer, 0)
    plain.step()
    scaler.step(scaled)
    assert not changes(snapshot(plain), snapshot(scaled))


def test_a_scaler_finds_no_gradient_at_all():
    optimizer = mixed()
    scaler_for("cpu").step(optimizer)
    assert optimizer.metrics()["step"].tolist() == [1]


@pytest.mark.parametrize("unscale_first", [False, True])
def test_an_overflow_skips_the_step_and_nothing_else(device, backend, unscale_first):
    optimizer, scaler = mixed(device, backend), scaler_for(device)
    for k in range(2):
        set_grads(optimizer, k, scale=1024.0)
        scaler.step(optimizer)
        scaler.update()
    set_grads(optimizer, 2, scale=1024.0)
    spoil(optimizer, math.nan, index=4)
    if unscale_first:
        scaler.unscale_(optimizer)
    before = snapshot(optimizer, lr=False)
    scaler.step(optimizer)
    scaler.update()
    assert changes(before, snapshot(optimizer, lr=False)) == ["skipped"]
    assert skipped(optimizer) == 1
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_run_with_overflows_is_the_run_without_those_steps(device, backend, max_grad_norm):
    whole = mixed(device, backend, max_grad_norm=max_grad_norm)
    broken = mixed(device, backend, max_grad_norm=max_grad_norm)
    scaler = scaler_for(device)
    for k in range(8):
        set_grads(whole, k)
        whole.step()
        whole.scheduler.step()
        while True:
            set_grads(broken, k, scale=scaler.get_scale())
            overflow = k in (0, 3, 4) and scaler.get_scale() > 1024.0 / 2 ** (1 + k)
            if overflow:
                spoil(broken)
            scaler.step(broken)
            scaler.update()
            broken.scheduler.step()
            if not overflow:
                break
    assert set(changes(snapshot(whole), snapshot(broken))) <= {"grads", "skipped"}
    assert skipped(broken) > 2
    assert broken.scheduler.last_epoch == 8


def test_torchs_own_schedule_drifts_after_an_overflow():
    """Beside ours: stock fused AdamW with LambdaLR, as accelerate and Lightning drive it."""
    stock = make_stock(make_params((torch.float32,)), fused=True)
    stock_scheduler = LambdaLR(stock, SCHEDULE.lr_at)
    ours = scheduled(make_params((torch.float32,)))
    for optimizer, scheduler in ((stock, stock_scheduler), (ours, ours.scheduler)):
        scaler = scaler_for("cpu")
        for k in range(4):
            set_grads(optimizer, k, scale=scaler.get_scale())
            if k == 1:
                spoil(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
    assert stock.state[stock.param_groups[0]["params"][0]]["step"] == 3
    assert stock_scheduler.last_epoch == 4
    assert ours.state[ours.param_groups[0]["params"][0]]["step"] == 3
    assert ours.scheduler.last_epoch == 3
    assert ours.scheduler.get_last_lr() == [SCHEDULE.lr_at(3, PEAK)]


def test_torch_applies_inf_gradients_where_two_devices_report_them():
    """Beside ours: the flag is a sum over devices, and stock fused AdamW skips at exactly 1.0 only."""
    stock = make_stock(make_params((torch.float32,)), fused=True)
    set_grads(stock, 0)
    spoil(stock)
    stock.found_inf = torch.tensor(2.0)
    stock.step()
    p = params_of(stock)[0]
    assert stock.state[p]["step"] == -1
    assert not p.isfinite().all()


def test_amp_scaling_is_announced_unless_switched_off():
    assert mixed()._step_supports_amp_scaling
    assert not hasattr(mixed(amp_scaling=False), "_step_supports_amp_scaling")


def test_without_amp_scaling_the_scaler_skips_by_itself():
    optimizer, scaler = mixed(amp_scaling=False), scaler_for("cpu")
    for k in range(5):
        set_grads(optimizer, k, scale=scaler.get_scale())
        if k in (1, 2):
            spoil(optimizer)
        scaler.step(optimizer)
        scaler.update()
        # called whatever happened, as accelerate does where it cannot tell
        optimizer.scheduler.step()
    assert optimizer.metrics()["step"].tolist() == [3]
    assert optimizer.scheduler.get_last_lr() == [SCHEDULE.lr_at(3, PEAK)]
    # the optimizer was not asked, so it has nothing to count
    assert skipped(optimizer) == 0


@pytest.mark.parametrize("amp_scaling", [True, False])
def test_copies_answer_a_scaler_as_the_original(amp_scaling):
    optimizer = mixed(amp_scaling=amp_scaling)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert getattr(twin, "_step_supports_amp_scaling", False) == amp_scaling


def test_skips_are_counted_on_through_a_copy():
    optimizer = mixed(max_grad_norm=1.0)
    set_grads(optimizer, 0)
    spoil(optimizer)
    optimizer.step()
    assert skipped(copy.deepcopy(optimizer)) == 1
    assert skipped(pickle.loads(pickle.dumps(optimizer))) == 1
