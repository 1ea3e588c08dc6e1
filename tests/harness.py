"""Runs a case with stock torch or with fusedlr, from the same start and with the same gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import Case
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import fusedlr
from fusedlr import backends


@dataclass
class Run:
    """What a run leaves behind, in the order of the parameters."""

    params: list[Tensor]
    optimizer: torch.optim.Optimizer

    def state(self, key: str) -> list[Tensor]:
        """One entry of the state of every parameter that has any."""
        return [self.optimizer.state[p][key] for p in self.params if self.optimizer.state.get(p)]


def backends_on(device: str) -> list[str]:
    """Names of the backends that can run on a device."""
    if device != "cpu" and not torch.cuda.is_available():
        return ["reference"]
    return [name for name, why in backends.reasons([torch.device(device)]).items() if why is None]


def brief(case: Case, device: str, backend: str) -> Case:
    """The case, or its first steps where the machine of ptx/ runs it: a millisecond per tensor and launch."""
    executed = device == "cpu" and backend in ("cuda", "triton")
    return replace(case, steps=min(case.steps, 6)) if executed else case


def make_groups(case: Case, dtype: torch.dtype, start: torch.dtype, device: str) -> list[dict[str, Any]]:
    """Param groups of the case; values are drawn in fp64 and rounded through `start`, then to `dtype`.

    With `dtype` fp64 and `start` fp32 the oracle starts from exactly the fp32 run's numbers.
    """
    generator = torch.Generator().manual_seed(0)
    groups = []
    for group in case.groups:
        params = []
        for shape in group.shapes:
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            values = values.to(group.dtype or start)
            kept = dtype if dtype == torch.float64 else (group.dtype or dtype)
            if case.name == "misaligned":
                # a view one element into its storage: not 16-byte aligned
                storage = torch.empty(values.numel() + 1, dtype=kept, device=device)
                tensor = storage[1:].view(shape).copy_(values)
            else:
                tensor = values.to(device, kept)
            params.append(torch.nn.Parameter(tensor))
        groups.append({"params": params, **group.options})
    return groups


def gradients(case: Case, groups: list[dict[str, Any]], start: torch.dtype) -> Iterator[int]:
    """Set the gradients of one step after the other; yields the step."""
    generator = torch.Generator().manual_seed(1)
    for k in range(case.steps):
        i = 0
        for spec, group in zip(case.groups, groups, strict=True):
            for p in group["params"]:
                values = torch.randn(p.shape, generator=generator, dtype=torch.float64) + case.grad_mean
                values = values * case.grad_size(k) * (case.scale or 1.0)
                values = values.to(spec.dtype or start).to(p.device, p.dtype)
                if i == 0 and case.overflow(k):
                    values.view(-1)[0] = torch.inf
                p.grad = None if case.missing(k, i) else values
                i += 1
        yield k


def run(
    case: Case,
    make: Callable[[list[dict[str, Any]]], Any],
    *,
    dtype: torch.dtype = torch.float64,
    start: torch.dtype | None = None,
    device: str = "cpu",
    after: Callable[[Any, int], None] = lambda optimizer, k: None,
) -> Run:
    """Run a case with the stepper that `make` builds: `make(groups) -> (optimizer, step)`."""
    groups = make_groups(case, dtype, start or dtype, device)
    optimizer, step = make(groups)
    for k in gradients(case, groups, start or dtype):
        step(k)
        after(optimizer, k)
    return Run([p for group in groups for p in group["params"]], optimizer)


def fused(case: Case, **options: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """fusedlr on a case."""

    def make(groups: list[dict[str, Any]]) -> Any:
        settings = {"schedule": case.schedule, "max_grad_norm": case.max_grad_norm, **case.options, **options}
        optimizer = fusedlr.FusedAdamW(groups, lr=case.lr, **settings)

        def step(k: int) -> None:
            if case.scale is not None:
                # as torch.amp.GradScaler leaves them
                optimizer.grad_scale = torch.tensor(case.scale)
                optimizer.found_inf = torch.tensor(case.found_inf(k))
            optimizer.step()

        return optimizer, step

    return make


def stock(case: Case, **options: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """clip_grad_norm_, torch.optim.AdamW and LambdaLR on a case, in the documented order."""

    def make(groups: list[dict[str, Any]]) -> Any:
        optimizer = torch.optim.AdamW(groups, lr=case.lr, **{**case.options, **options})
        scheduler = LambdaLR(optimizer, case.schedule.resolve(case.lr).lr_at)
        params = [p for group in groups for p in group["params"]]

        def step(k: int) -> None:
            if case.skips(k):
                return
            if case.scale is not None:
                for p in params:
                    p.grad = None if p.grad is None else p.grad / case.scale
            if case.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(params, case.max_grad_norm)
            optimizer.step()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler.step()

        return optimizer, step

    return make


def relative_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference of an element over the largest element of its tensor, over all tensors.

    inf where one is not finite: `max` of Python would let a nan pass.
    """
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.numel():
            x, y = x.double(), y.double()
            difference = ((x - y).abs().max() / y.abs().max().clamp(min=1e-300)).item()
            worst = max(worst, difference) if math.isfinite(difference) else math.inf
    return worst


def squared_error(a: list[Tensor], oracle: list[Tensor]) -> float:
    """Sum of squared differences over all elements."""
    pairs = [(x.double(), y.double()) for x, y in zip(a, oracle, strict=True)]
    return sum(((x - y) ** 2).sum().item() for x, y in pairs)
