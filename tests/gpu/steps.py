"""Runs of a GPU backend and of the reference side by side, and how far they are apart.

On the CPU the kernels' PTX runs on the machine of ptx/: a test with the argument `gpu_backend` runs once for
each backend that can be compiled here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from harness import relative_difference
from ptx import driver
from tolerances import GPU_STEP
from torch import Tensor, nn

import fusedlr
from fusedlr.kept import MOMENTS, has_rest
from fusedlr.reference import fp32_value

SCHEDULE = fusedlr.cosine(warmup_steps=2, total_steps=12, min_lr_ratio=0.1)


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


def whole_values(params: Iterable[Tensor], optimizer: Any) -> list[Tensor]:
    """The parameters; in fp32 those that the state has the rest of, but for 16-bit moments, which round."""
    state = [optimizer.state.get(p) or {} for p in params]
    return [
        fp32_value(p, entry)
        if has_rest(entry) and entry["exp_avg"].dtype == torch.float32
        else p.detach().clone()
        for p, entry in zip(params, state, strict=True)
    ]


def compare(ours: fusedlr.FusedAdamW, theirs: fusedlr.FusedAdamW) -> None:
    """Everything that a step leaves behind: counts exactly, numbers to the rounding of fp32."""
    assert difference(ours, theirs) <= GPU_STEP
    assert counts(ours) == counts(theirs)


def counts(optimizer: fusedlr.FusedAdamW) -> list[Any]:
    steps = [optimizer.state[p]["step"].item() for p in all_params(optimizer) if optimizer.state.get(p)]
    in_row = optimizer._counts.counters.skips_in_row.tolist()
    return [steps, optimizer.metrics()["step"].tolist(), optimizer.metrics()["skipped"].tolist(), in_row]


def difference(ours: fusedlr.FusedAdamW, theirs: fusedlr.FusedAdamW) -> float:
    """Largest relative difference of parameters, moments and of what the step says it used."""
    pairs = [tuple(whole_values(all_params(o), o) for o in (ours, theirs))]
    for key in MOMENTS:
        pairs.append(tuple([s[key] for s in o.state.values() if key in s] for o in (ours, theirs)))
    for key in ("lr", "grad_norm", "coef", "limit"):
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


def both(gpu_backend: str, make: Callable[[], list[dict[str, Any]]], **options: Any) -> fusedlr.FusedAdamW:
    ours = train(gpu_backend, make, **options)
    assert ours.backend == gpu_backend
    compare(ours, train("reference", make, **options))
    return ours


def launched() -> int:
    """How many launches there have been in this process."""
    return driver.installed().machine.stats().launches


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The arguments of all calls from now on."""
    calls: list[Any] = []
    original = getattr(owner, name)

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(owner, name, counted)
    return calls
