"""Arguments of odd types and tensor betas, and what a step refuses before it changes anything."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

import fusedlr
from fusedlr import FusedAdamW


def param(n=3):
    return nn.Parameter(torch.arange(float(n)))


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


def test_betas_in_a_list_are_read_at_every_step():
    betas = [0.9, 0.99]

    def make(p):
        optimizer = FusedAdamW([p], lr=0.1)
        optimizer.param_groups[0]["betas"] = betas
        return optimizer

    got = run_filling(make, betas, lambda b: b.__setitem__(0, 0.5))
    b1 = torch.tensor(0.9)
    want = run_filling(
        lambda p: FusedAdamW([p], lr=0.1, betas=(b1, torch.tensor(0.99))), b1, lambda b: b.fill_(0.5)
    )
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
