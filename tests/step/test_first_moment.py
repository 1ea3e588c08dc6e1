"""The first moment is torch's lerp in both of its forms: with a small beta a small gradient is not lost."""

from __future__ import annotations

import pytest
import torch
from tolerances import LERP_ULPS
from torch import Tensor, nn
from wrong import steps as wrong_steps

import fusedlr
from fusedlr import reference

# 1 - b1 of 0.5 and more is the form that starts at the gradient
BETAS = (0.0, 0.01, 0.1, 0.4, 0.5, 0.500001, 0.6, 0.9, 0.999)
SPIKE = (1e4, 1e-4, 1.0, 1e-4)


def moments(make: type[torch.optim.Optimizer], b1: float, dtype: torch.dtype, **options: str) -> list[Tensor]:
    """The first moment after every gradient of a run with a spike."""
    p = nn.Parameter(torch.linspace(0.5, 1, 7, dtype=dtype))
    optimizer = make([p], lr=0.1, betas=(b1, 0.9), **options)
    found = []
    for size in SPIKE:
        p.grad = torch.linspace(0.1, 1, 7, dtype=dtype) * size
        optimizer.step()
        found.append(optimizer.state[p]["exp_avg"].clone())
    return found


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest relative difference of an element."""
    return max(((x - y).abs() / y.abs()).max().item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", ("reference", "cpu"))
@pytest.mark.parametrize("b1", BETAS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_the_first_moment_is_torch_lerp_whatever_beta(dtype, b1, backend):
    if fusedlr.backends.reasons([torch.device("cpu")])[backend]:
        pytest.skip(f"the {backend} backend is not built here")
    ours = moments(fusedlr.FusedAdamW, b1, dtype, backend=backend)
    theirs = moments(torch.optim.AdamW, b1, dtype)
    # torch rounds 1 - b1 before it takes it from 1 again, which costs a small beta digits of the old moment
    lost = LERP_ULPS + (1 / b1 if 0 < b1 < 0.5 else 0)
    assert worst(ours, theirs) <= lost * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_without_memory_the_moment_is_the_gradient(backend):
    if fusedlr.backends.reasons([torch.device("cpu")])[backend]:
        pytest.skip(f"the {backend} backend is not built here")
    for dtype in (torch.float64, torch.float32):
        for moment, size in zip(moments(fusedlr.FusedAdamW, 0.0, dtype, backend=backend), SPIKE, strict=True):
            assert torch.equal(moment, torch.linspace(0.1, 1, 7, dtype=dtype) * size)


def test_a_moment_that_always_starts_at_the_old_one_is_rejected(monkeypatch):
    wrong = wrong_steps.load("small b1 loses a small gradient")
    monkeypatch.setattr(reference, "adamw_", wrong.adamw_)
    ours = moments(fusedlr.FusedAdamW, 0.0, torch.float32, backend="reference")
    assert worst(ours, moments(torch.optim.AdamW, 0.0, torch.float32)) == 1.0
