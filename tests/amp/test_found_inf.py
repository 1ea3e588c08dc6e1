"""What `found_inf` and `grad_scale` may be, and that a skipped step leaves every bit."""

from __future__ import annotations

import math

import pytest
import torch
from kit import mixed, set_grads, skipped
from snapshots import bits, changes, params_of, snapshot
from torch import Tensor, nn

import fusedlr


def flags() -> list:
    values = [0.0, 1.0, 2.0, -1.0, math.nan, math.inf, 1e-300]
    out = [(torch.tensor(v, dtype=torch.float64), v) for v in values]
    out += [(torch.tensor([v]), v) for v in values[:-1]]
    out += [(v, v) for v in (0, 1, 2, 0.0, 1.0, math.nan, False, True)]
    out += [(torch.tensor(v), v) for v in (0, 1, 2, False, True)]
    out += [(torch.tensor([[True]]), True), (torch.tensor([0], dtype=torch.uint8), 0)]
    return [
        pytest.param(f, v, id=f"{v}-{getattr(f, 'dtype', type(f).__name__)}-{getattr(f, 'ndim', '')}")
        for f, v in out
    ]


@pytest.mark.parametrize(("flag", "value"), flags())
def test_any_found_inf_but_zero_skips(device, backend, flag, value):
    optimizer, plain = mixed(device, backend), mixed(device, backend)
    for k in range(2):
        for each in (optimizer, plain):
            set_grads(each, k)
            each.step()
            each.scheduler.step()
    for each in (optimizer, plain):
        set_grads(each, 2)
    before = snapshot(optimizer)
    optimizer.found_inf = flag.to(device) if isinstance(flag, Tensor) else flag
    optimizer.step()
    if value == 0:
        plain.step()
        assert not changes(snapshot(plain), snapshot(optimizer))
        return
    assert changes(before, snapshot(optimizer)) == ["skipped"]
    assert skipped(optimizer) == 1
    # and the run goes on as if that step had not been asked for
    del optimizer.found_inf
    optimizer.step()
    plain.step()
    assert changes(snapshot(plain), snapshot(optimizer)) == ["skipped"]


def test_a_skipped_first_step_leaves_fresh_state(device, backend):
    optimizer = mixed(device, backend, amsgrad=True)
    set_grads(optimizer, 0)
    before = [bits(p) for p in params_of(optimizer)]
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    assert [bits(p) for p in params_of(optimizer)] == before
    for p in params_of(optimizer):
        assert {key: value.abs().sum().item() for key, value in optimizer.state[p].items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"), 0.0
        )
    del optimizer.found_inf
    fresh = mixed(device, backend, amsgrad=True)
    set_grads(fresh, 0)
    optimizer.step()
    fresh.step()
    assert changes(snapshot(fresh), snapshot(optimizer)) == ["skipped"]


def test_bits_that_arithmetic_would_lose_survive_a_skip(device, backend):
    """A nan with a payload, -0.0 and denormal numbers: a skip selects, it does not multiply by zero."""
    payload = torch.tensor([0x7FC01234, -0x80000000, 1, 0x7F800000], dtype=torch.int32).view(torch.float32)
    p = nn.Parameter(payload.to(device))
    optimizer = fusedlr.FusedAdamW([p], lr=0.1, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    assert bits(p) == bits(payload)


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("shape", [(2,), (0,), (1, 3)])
def test_a_signal_of_several_elements_is_refused(name, shape):
    optimizer = mixed()
    set_grads(optimizer, 0)
    before = snapshot(optimizer)
    setattr(optimizer, name, torch.ones(shape))
    with pytest.raises(ValueError, match=rf"{name} has shape \({shape[0]},.*\), expected one element"):
        optimizer.step()
    assert not changes(before, snapshot(optimizer))
