"""The shared suite on the machine: runs a case, and compares all that it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache

import cases as suite
import harness
import torch
from gpu import cases as gpu_cases
from gpu.cases import BF16, F16, F32
from gpu.steps import whole_values
from tolerances import (
    GPU_16_BIT_SHARE,
    GPU_CHANGES,
    GPU_RMS_FLOOR,
    GPU_RMS_RATIO,
    GPU_STEP,
    GPU_SUMS,
    GPU_USED,
)
from torch import Tensor

from fusedlr.columns import METRICS, SUMS
from fusedlr.kept import MOMENTS
from fusedlr.record import Ring

from . import driver

# steps of a case of the optimizer suite: past the first, whose rate is 0, and past the first skips
_SUITE_STEPS = 4
# tensors with fewer elements say nothing of an average
_ENOUGH = 500
# of the sum of all changes of 16-bit parameters
_ROUNDED = 0.02


@dataclass(frozen=True)
class Outcome:
    """What the steps leave behind, in the order of the parameters."""

    # "params", in fp32 those that the state has the rest of, and moments by name, empty where there is none
    tensors: dict[str, list[Tensor]]
    updates: list[float]  # of every tensor, -1 before the first
    counts: Tensor
    used: Tensor  # without the norms, which are
    norms: Tensor
    # the tensors of the ring, empty where there is none
    recorded_ints: Tensor
    recorded_used: Tensor
    recorded_sums: Tensor

    @staticmethod
    def of(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> Outcome:
        """Of an optimizer of these parameters."""
        state = [optimizer.state.get(p, {}) for p in params]
        moments = {key: [s[key].clone() if key in s else torch.empty(0) for s in state] for key in MOMENTS}
        updates = [float(s["step"]) if "step" in s else -1.0 for s in state]
        counters = driver.counters(optimizer)
        return Outcome(
            {"params": whole_values(params, optimizer), **moments},
            updates,
            counters.counts.clone(),
            counters.used[: len(METRICS)].clone(),
            counters.norms.clone(),
            *_recorded(counters.ring),
        )


def _recorded(ring: Ring | None) -> list[Tensor]:
    if ring is None:
        return [torch.empty(0)] * 3
    return [x.clone() for x in (ring.ints, ring.used, ring.sums)]


@dataclass(frozen=True, eq=False)
class Case:
    """A case of the shared suite, whatever its kind; `run(backend, double)`."""

    name: str
    run: Callable[[str, bool], Outcome]
    steps: int
    large: bool = False
    of_suite: bool = False  # of cases.py, not of gpu/cases.py
    backends: tuple[str, ...] = driver.BACKENDS  # whose kernels it is for


def _of_suite(case: suite.Case, dtype: torch.dtype) -> Case:
    short = replace(case, steps=min(case.steps, _SUITE_STEPS))

    def run(backend: str, double: bool) -> Outcome:
        made = harness.run(
            short,
            harness.fused(short, backend=backend),
            dtype=torch.float64 if double else dtype,
            start=dtype,
        )
        return Outcome.of(made.params, made.optimizer)

    name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
    return Case(name, run, short.steps, of_suite=True)


def _of_gpu(name: str, case: gpu_cases.GpuCase) -> Case:
    def run(backend: str, double: bool) -> Outcome:
        return Outcome.of(*gpu_cases.run(case, backend, double))

    return Case(name, run, case.steps, case.large, backends=case.backends)


@cache
def all_cases() -> dict[str, Case]:
    """Every case there is, by its name."""
    found = [_of_gpu(name, case) for name, case in gpu_cases.GPU_CASES.items()]
    found += [_of_suite(case, F32) for case in suite.CASES]
    found += [_of_suite(case, BF16) for case in suite.UNIFORM if case.grad_size(0) == 1]
    return {case.name: case for case in found}


@cache
def expected(case: Case) -> tuple[Outcome, Outcome]:
    """By the reference, in the case's own types and in fp64, where that says anything."""
    theirs = case.run("reference", False)
    return theirs, theirs if case.large else case.run("reference", True)


def bits_differ(a: Outcome, b: Outcome) -> str | None:
    """Where two outcomes are not the same bits, in words, or None."""

    def bits(x: Tensor) -> Tensor:
        return x.contiguous().view(-1).view(torch.uint8)

    for name, tensors in a.tensors.items():
        for i, (x, y) in enumerate(zip(tensors, b.tensors[name], strict=True)):
            if not torch.equal(bits(x), bits(y)):
                return f"the bits of {name}[{i}] depend on the order"
    for field in fields(Outcome)[-6:]:
        if not torch.equal(bits(getattr(a, field.name)), bits(getattr(b, field.name))):
            return f"the bits of {field.name} depend on the order"
    return None if a.updates == b.updates else "updates of tensors depend on the order"


def leaves_reference(ours: Outcome, case: Case) -> str | None:
    """What is further from the reference than rounding explains, in words, or None."""
    theirs, oracle = expected(case)
    if ours.updates != theirs.updates:
        return f"updates {ours.updates[:9]} instead of {theirs.updates[:9]}"
    if not torch.equal(ours.counts, theirs.counts):
        return f"counts {ours.counts[:, :6].tolist()} instead of {theirs.counts[:, :6].tolist()}"
    for name in ("used", "recorded_used"):
        used, wanted = getattr(ours, name).double(), getattr(theirs, name).double()
        if _nonfinite_differ(used, wanted) or _apart(used, wanted) > GPU_USED:
            return f"{name} {used[..., :6].tolist()} instead of {wanted[..., :6].tolist()}"
    if (why := _sums_differ(ours, theirs)) is not None:
        return why
    if _norms_differ(ours.norms.double(), theirs.norms):
        return f"norms {ours.norms[:, :4].tolist()} instead of {theirs.norms[:, :4].tolist()}"
    for name, tensors in ours.tensors.items():
        reference, exact = theirs.tensors[name], oracle.tensors[name]
        # of all tensors of the kind: the elements of a small one may cancel
        largest = max(
            (float(y[y.isfinite()].abs().max()) for y in reference if y.isfinite().any()), default=0.0
        )
        for i, (x, y, z) in enumerate(zip(tensors, reference, exact, strict=True)):
            if (why := _tensor_differs(x, y, z, case.steps, largest)) is not None:
                return f"{name}[{i}] of {x.numel()} elements: {why}"
    return None


def _apart(x: Tensor, y: Tensor, least: float = 1e-30) -> float:
    """How far finite numbers are from others, relative to these, or to `least` where they are below it."""
    off = ((x - y).abs() / y.abs().clamp(min=max(least, 1e-30)))[y.isfinite()]
    return float(off.max()) if off.numel() else 0.0


def _sums_differ(ours: Outcome, theirs: Outcome) -> str | None:
    """Whether other sums of squares are recorded, in words, or None."""
    if not torch.equal(ours.recorded_ints, theirs.recorded_ints):
        return f"recorded {ours.recorded_ints.tolist()} instead of {theirs.recorded_ints.tolist()}"
    sums, wanted = ours.recorded_sums.double(), theirs.recorded_sums.double()
    if not sums.numel():
        return None
    if _nonfinite_differ(sums, wanted) or not torch.equal(sums < 0, wanted < 0):
        return f"recorded sums {sums[..., :4].tolist()} instead of {wanted[..., :4].tolist()}"
    for row, name in enumerate(SUMS):
        x, y = sums[:, row], wanted[:, row]
        # a 16-bit change may be that of the next number, so that only all together are alike
        rounded = name == "change" and any(p.dtype != F32 for p in ours.tensors["params"])
        if rounded:
            x, y = x.clamp(min=0).sum(), y.clamp(min=0).sum()
        most = GPU_SUMS if name != "change" else _ROUNDED if rounded else GPU_CHANGES
        # of a tensor of a few elements they may cancel
        if _apart(x, y, least=0.01 * float(y[y.isfinite()].max())) > most:
            return f"recorded sums of {name} {x[..., :6].tolist()} instead of {y[..., :6].tolist()}"
    return None


def _norms_differ(ours: Tensor, theirs: Tensor) -> bool:
    """Whether a `ZClip` has seen other norms; a norm is off by as much as the `GPU_USED` of it."""
    (seen, *x), (wanted, *y) = ours, theirs
    mean, variance, mean_wanted, variance_wanted = x[0] + x[1], x[2] + x[3], y[0] + y[1], y[2] + y[3]
    most = GPU_USED * mean_wanted
    # the square of a deviation, of which both numbers are off by that much
    of_square = 4 * most * (variance_wanted.sqrt() + most)
    off = ((mean - mean_wanted).abs() > most) | ((variance - variance_wanted).abs() > of_square)
    return not torch.equal(seen, wanted) or bool(off.any()) or not bool(ours.isfinite().all())


def _nonfinite_differ(x: Tensor, y: Tensor) -> bool:
    return not torch.equal(
        torch.where(x.isfinite(), 0, x).nan_to_num(7), torch.where(y.isfinite(), 0, y).nan_to_num(7)
    )


def _tensor_differs(x: Tensor, y: Tensor, exact: Tensor, steps: int, largest: float) -> str | None:
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"{x.dtype}{tuple(x.shape)} instead of {y.dtype}{tuple(y.shape)}"
    if _nonfinite_differ(x, y):
        return "other elements are not finite"
    kept = x.isfinite()
    x64, y64, exact = x.double()[kept], y.double()[kept], exact.double()[kept]
    if not x64.numel():
        return None
    apart = (x64 - y64).abs()
    if x.dtype != F32:
        units = apart / _unit(torch.maximum(x64.abs(), y64.abs()), x.dtype)
        if units.max() > steps:
            return f"off by {units.max():.3g} units"
        share = (units > 0).double().mean()
        return f"{share:.3g} of them differ" if share > GPU_16_BIT_SHARE * steps + 2 / x.numel() else None
    worst = apart.max() / y64.abs().max().clamp(min=max(0.05 * largest, 1e-30))
    if worst > GPU_STEP:
        return f"off by {worst:.3g}"
    if x64.numel() < _ENOUGH or not exact.isfinite().all():
        return None
    error, reference = ((a - exact).square().mean().sqrt() for a in (x64, y64))
    too_much = error > GPU_RMS_RATIO * reference + GPU_RMS_FLOOR * exact.abs().max()
    return f"RMS error {error:.3g} where the reference has {reference:.3g}" if too_much else None


def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of 16-bit numbers."""
    bits, smallest = {BF16: (8, -133), F16: (11, -24)}[dtype]
    exponent = torch.frexp(x).exponent - bits
    return torch.ldexp(torch.ones_like(x), exponent.clamp(min=smallest))
