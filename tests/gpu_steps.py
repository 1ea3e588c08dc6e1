"""Runs of a GPU backend and of the reference side by side, and how far they are apart.

BACKEND is the one that this process has on the CPU: Triton where its interpreter is on, else the CUDA kernels
as cuda_host.py compiles them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import cuda_host
import pytest
import torch
from harness import backends_on, relative_difference
from tolerances import GPU_STEP
from torch import Tensor, nn

import fusedlr
from fusedlr import triton_step

BACKEND = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
needs_backend = pytest.mark.skipif(
    BACKEND not in backends_on("cpu"), reason=f"{BACKEND} does not run on this CPU"
)

SCHEDULE = fusedlr.cosine(warmup_steps=2, total_steps=12, min_lr_ratio=0.1)
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def params(*shapes: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def train(
    backend: str,
    make: Callable[[], list[dict[str, Any]]],
    steps: int = 3,
    before: Callable[[Any, int], None] = lambda optimizer, k: None,
    **options: Any,
) -> fusedlr.FusedAdamW:
    """Some steps on made-up gradients; `before` sees the optimizer with its gradients before each."""
    settings = {"lr": 0.01, "schedule": SCHEDULE, "max_grad_norm": 1.0, **options}
    optimizer = fusedlr.FusedAdamW(make(), backend=backend, **settings)
    generator = torch.Generator().manual_seed(1)
    for k in range(steps):
        for p in all_params(optimizer):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        before(optimizer, k)
        optimizer.step()
    return optimizer


def all_params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def compare(ours: fusedlr.FusedAdamW, theirs: fusedlr.FusedAdamW) -> None:
    """Everything that a step leaves behind: counts exactly, numbers to the rounding of fp32."""
    assert difference(ours, theirs) <= GPU_STEP
    assert counts(ours) == counts(theirs)


def counts(optimizer: fusedlr.FusedAdamW) -> list[Any]:
    steps = [optimizer.state[p]["step"].item() for p in all_params(optimizer) if optimizer.state.get(p)]
    in_row = optimizer._counters.skips_in_row.tolist()
    return [steps, optimizer.metrics()["step"].tolist(), optimizer.metrics()["skipped"].tolist(), in_row]


def difference(ours: fusedlr.FusedAdamW, theirs: fusedlr.FusedAdamW) -> float:
    """Largest relative difference of parameters, moments and of what the step says it used."""
    pairs = [(all_params(ours), all_params(theirs))]
    for key in MOMENTS:
        pairs.append(tuple([s[key] for s in o.state.values() if key in s] for o in (ours, theirs)))
    for key in ("lr", "grad_norm", "coef"):
        pairs.append(tuple(list(o.metrics()[key].double().reshape(-1).split(1)) for o in (ours, theirs)))
    return max(_difference(a, b) for a, b in pairs)


def _difference(a: list[Tensor], b: list[Tensor]) -> float:
    """`relative_difference` where both are finite; elsewhere they must be the same."""
    for x, y in zip(a, b, strict=True):
        bad = ~(x.isfinite() & y.isfinite())
        if not torch.equal(x[bad].nan_to_num(7), y[bad].to(x.dtype).nan_to_num(7)):
            return math.inf
        if not torch.equal(x.isnan(), y.isnan()):
            return math.inf
    finite = [[torch.where(x.isfinite(), x, 7) for x in tensors] for tensors in (a, b)]
    return relative_difference(*finite)


def both(make: Callable[[], list[dict[str, Any]]], **options: Any) -> fusedlr.FusedAdamW:
    ours = train(BACKEND, make, **options)
    assert ours.backend == BACKEND
    compare(ours, train("reference", make, **options))
    return ours


def count_launches(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many launches there have been from now on, each time it is called."""
    if BACKEND == "cuda":
        so_far = cuda_host.functions().on_host_launches
        before = so_far()
        return lambda: so_far() - before
    calls = count_calls(monkeypatch, triton_step.Launcher, "_run")
    return lambda: len(calls)


def fail_after(launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the launch after so many of them fail, once."""
    if BACKEND == "cuda":
        cuda_host.functions().on_host_fail_after(launches)
        return
    run, calls = triton_step.Launcher._run, []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == launches + 1:
            raise RuntimeError("this launch is to fail")
        run(*args)

    monkeypatch.setattr(triton_step.Launcher, "_run", failing)


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The arguments of all calls from now on."""
    calls: list[Any] = []
    original = getattr(owner, name)

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(owner, name, counted)
    return calls
