"""Arguments of odd types and tensor betas, and what a step refuses before it changes anything."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import fusedlr
from fusedlr import FusedAdamW


def param(n=3):
    return nn.Parameter(torch.arange(float(n)))


HUGE = 10**400
REFUSED = [
    ({"betas": {0.99, 0.9}}, "must be two numbers"),
    ({"betas": ("0.9", "0.99")}, "betas=('0.9', '0.99') must be two numbers"),
    ({"betas": "99"}, "betas='99' must be two numbers"),
    ({"betas": {0.9: 1, 0.99: 2}}, "betas={0.9: 1, 0.99: 2} must be two numbers"),
    ({"betas": (True, 0.9)}, "betas=(True, 0.9) must be two numbers"),
    ({"betas": (0.9, 1 + 0j)}, "must be two numbers"),
    ({"betas": (torch.ones(2) / 2, 0.9)}, "must be two numbers"),
    ({"betas": (torch.tensor(1.5), 0.9)}, "betas[0]=tensor(1.5000) must be in [0, 1)"),
    ({"betas": (0.9, torch.tensor(math.nan))}, "betas[1]=tensor(nan) must be in [0, 1)"),
    ({"lr": True}, "lr=True must be a number >= 0"),
    ({"lr": HUGE}, "is too large"),
    ({"lr": math.inf}, "lr=inf must be finite"),
    ({"lr": torch.tensor(0.1 + 0j)}, "lr=tensor(0.1000+0.j) is not a number"),
    ({"lr": torch.tensor(True)}, "lr=tensor(True) is not a number"),
    ({"lr": torch.tensor(0.1, device="meta")}, "lr=tensor(..., device='meta', size=()) is not a number"),
    ({"lr": 0.1 + 0j}, "lr=(0.1+0j) must be a number >= 0"),
    ({"eps": "1e-8"}, "eps='1e-8' must be a number >= 0"),
    ({"eps": True}, "eps=True must be a number >= 0"),
    ({"eps": torch.ones(2)}, "eps has shape (2,), a tensor eps must have one element"),
    ({"weight_decay": False}, "weight_decay=False must be a number >= 0"),
    ({"weight_decay": math.inf}, "weight_decay=inf must be finite"),
    ({"maximize": "no"}, "maximize='no' must be True or False"),
    ({"maximize": 2}, "maximize=2 must be True or False"),
    ({"amsgrad": "no"}, "amsgrad='no' must be True or False"),
    ({"amsgrad": None}, "amsgrad=None must be True or False"),
]
SETTINGS = [
    ({"max_grad_norm": HUGE}, "is too large"),
    ({"max_grad_norm": np.bool_(True)}, "must be a number above 0"),
    ({"max_grad_norm": torch.tensor(1.0)}, "max_grad_norm=tensor(1.) must be a number above 0"),
    ({"amp_scaling": "no"}, "amp_scaling='no' must be True or False"),
    ({"differentiable": "no"}, "differentiable='no' must be True or False"),
    ({"nonfinite": torch.ones(2)}, "nonfinite=tensor([1., 1.]) is unknown"),
    ({"groups": ["joint"]}, "groups=['joint'] is unknown"),
    ({"backend": ["cpu"]}, "backend=['cpu'] is unknown"),
]


@pytest.mark.parametrize(("options", "message"), [*REFUSED, *SETTINGS], ids=lambda x: str(x)[:40])
def test_odd_arguments_are_refused_by_name(options, message):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}.*{re.escape(message.removeprefix(name))}"):
        FusedAdamW([param()], **options)


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_odd_options_of_a_group_are_refused_too(options, message):
    (name,) = options
    optimizer = FusedAdamW([param()])
    with pytest.raises(ValueError, match=f"{name}.*{re.escape(message.removeprefix(name))}"):
        optimizer.add_param_group({"params": [param()], **options})
    assert len(optimizer.param_groups) == 1


def test_a_peak_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="initial_lr='x' must be a number >= 0"):
        FusedAdamW([{"params": [param()], "initial_lr": "x"}], schedule=fusedlr.linear(1, 10))


def test_params_that_are_no_pairs_are_refused():
    with pytest.raises(
        ValueError, match=re.escape("params[0]=('a',) is not a pair of a name and a parameter")
    ):
        FusedAdamW([("a",)])


def test_extend_schedule_names_what_is_no_count():
    optimizer = FusedAdamW([param()], schedule=fusedlr.linear(0, 10))
    with pytest.raises(ValueError, match="total_steps='x' is not an integer"):
        optimizer.extend_schedule("x")


def test_numbers_of_numpy_become_plain():
    optimizer = FusedAdamW([param()], lr=np.float32(0.5), betas=np.array([0.5, 0.75]), eps=np.float64(1e-6))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.5, 0.75), 1e-6)
    assert {type(group["lr"]), type(group["eps"]), *map(type, group["betas"])} == {float}


# betas that are tensors


def run_filling(make, b1, fill):
    p = param()
    optimizer = make(p)
    for i in range(4):
        p.grad = torch.sin(p.detach() * (i + 1) + i)
        optimizer.step()
        if i == 1:
            fill(b1)
    return p.detach()


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("where", ["constructor", "group", "added group"])
def test_tensor_betas_are_read_at_every_step_as_in_torch(where, shape, backend):
    def make(cls, b1, **options):
        def build(p):
            betas = (b1, torch.tensor(0.99))
            if where == "constructor":
                return cls([p], lr=0.1, betas=betas, **options)
            if where == "group":
                return cls([{"params": [p], "betas": betas}], lr=0.1, **options)
            optimizer = cls([param(2)], lr=0.1, **options)
            optimizer.add_param_group({"params": [p], "betas": betas})
            return optimizer

        return build

    ours, theirs = torch.full(shape, 0.9), torch.full(shape, 0.9)
    got = run_filling(make(FusedAdamW, ours, backend=backend), ours, lambda b: b.fill_(0.5))
    want = run_filling(make(torch.optim.AdamW, theirs, foreach=False), theirs, lambda b: b.fill_(0.5))
    assert torch.allclose(got, want, rtol=1e-5, atol=0)


# gradients and state


@pytest.mark.parametrize("view", [torch._neg_view, lambda x: x, torch.Tensor.t], ids=["neg", "plain", "t"])
def test_zero_grad_zeroes_every_view(view):
    p = nn.Parameter(torch.ones(3, 3))
    grad = torch.ones(3, 3)
    p.grad = view(grad)
    kept = p.grad
    FusedAdamW([p]).zero_grad(set_to_none=False)
    assert p.grad is kept
    assert not grad.any()


def test_zero_grad_zeroes_a_conjugate_view():
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    p.grad = torch.ones(3, dtype=torch.complex64).conj()
    FusedAdamW([p]).zero_grad(set_to_none=False)
    assert not p.grad.any()


def freed():
    x = torch.ones(4)
    x.untyped_storage().resize_(0)
    return x


ODD_STATE = {
    "has elements that share memory, stride (0,)": lambda: torch.zeros(1).expand(4),
    "is of layout torch.sparse_coo, expected a dense tensor": lambda: torch.ones(4).to_sparse(),
    "is torch.complex64, expected a floating point number": lambda: torch.ones(4, dtype=torch.complex64),
    "is torch.qint8, expected": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "is torch.float8_e4m3fn, expected": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "is on meta but the parameter is on cpu": lambda: torch.ones(4, device="meta"),
    "has been freed": freed,
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("message", ODD_STATE)
@pytest.mark.filterwarnings("ignore")
def test_state_that_cannot_be_updated_is_refused_before_anything_changes(message, key, backend):
    first, second = param(4), param(4)
    optimizer = FusedAdamW(
        [("first", first), ("second", second)], schedule=fusedlr.linear(2, 20), backend=backend
    )
    for _ in range(2):
        first.grad, second.grad = torch.ones(4), torch.ones(4)
        optimizer.step()
    optimizer.state[second][key] = ODD_STATE[message]()
    before = first.detach().clone(), second.detach().clone(), optimizer.metrics()["step"].clone()
    with pytest.raises(
        RuntimeError, match=f"parameter 'second': .*its {key} .*{re.escape(message[-20:])}|freed"
    ):
        optimizer.step()
    after = first.detach(), second.detach(), optimizer.metrics()["step"]
    assert all(map(torch.equal, before, after))
    assert [float(optimizer.state[p]["step"]) for p in (first, second)] == [2, 2]
    # with a good one it goes on
    optimizer.state[second][key] = torch.ones(4)
    optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [3]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_moment_made_in_inference_mode_is_copied(backend):
    p = param(4)
    optimizer = FusedAdamW([p], backend=backend)
    p.grad = torch.ones(4)
    optimizer.step()
    with torch.inference_mode():
        moment = torch.ones(4)
    optimizer.state[p]["exp_avg"] = moment
    optimizer.step()
    assert torch.equal(moment, torch.ones(4))
    assert optimizer.state[p]["exp_avg"] is not moment
