"""Runs on which a wrong kernel leaves the reference, whatever it does wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from gpu_steps import BACKEND, counts, difference, train
from torch import nn

import fusedlr

# what a right step may differ by: fp32 rounds to GPU_STEP; 16 bits are compared in tests of their own
MARGIN = 2e-6


def make() -> list[dict[str, Any]]:
    """Groups that show every mistake between them."""
    generator = torch.Generator().manual_seed(0)
    tensors = [nn.Parameter(torch.randn(n, generator=generator)) for n in (4100, 7, 5, 3)]
    return [
        {"params": tensors[:2], "betas": (0.8, 0.95), "weight_decay": 0.1, "eps": 1e-3},
        {"params": tensors[2:3], "amsgrad": True, "maximize": True, "betas": (0.5, 0.1)},
        {"params": tensors[3:]},
    ]


def _events(optimizer: Any, k: int) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    params[3].grad = None
    for p in params[:3]:
        # small gradients are not clipped
        p.grad *= 64.0 * (1.0, 1e-6, 1.0, 1.0, 1e-2, 1.0)[k]
    optimizer.grad_scale = torch.tensor(64.0)
    optimizer.found_inf = torch.tensor((0.0, 0.0, -1.0, 0.0, 0.0, math.nan)[k])
    if k == 3:
        params[0].grad[1] = math.inf


# param groups to train, and how
Run = tuple[Callable[[], list[dict[str, Any]]], dict[str, Any]]
RUNS: tuple[Run, ...] = (
    # the limit is small, so that the epsilon of the norm shows
    (make, {"steps": 6, "before": _events, "max_grad_norm": 1e-5}),
    (make, {"steps": 6, "before": _events, "groups": "independent"}),
)


_wanted: dict[int, fusedlr.FusedAdamW] = {}


def wanted(run: Run) -> fusedlr.FusedAdamW:
    """What the reference makes of a run, which is kept."""
    make, options = run
    if id(run) not in _wanted:
        _wanted[id(run)] = train("reference", make, **options)
    return _wanted[id(run)]


def rejected(runs: tuple[Run, ...] = RUNS) -> bool:
    """Whether a run of the kernels in use leaves the reference."""
    for run in runs:
        make, options = run
        ours, theirs = train(BACKEND, make, **options), wanted(run)
        if counts(ours) != counts(theirs) or not difference(ours, theirs) <= MARGIN:
            return True
    return False
