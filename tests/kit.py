"""What the tests of the optimizer share: parameters, optimizers, gradients, torch's twin, ways to internals.

All numbers come from fixed seeds: two optimizers that are made and stepped alike get the same ones.
"""

from __future__ import annotations

import importlib.util
import io
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from snapshots import params_of
from torch import Tensor, nn
from torch.optim import Optimizer

import fusedlr
from fusedlr import backends
from fusedlr import step as step_module
from fusedlr.backends import compiled
from fusedlr.backends.order import StepInputs
from fusedlr.reference import Counters, GroupStep, Row, Scope, Signals, Stepper

ROOT = Path(__file__).resolve().parents[1]
# for tests of what the compiled modules alone do
needs_kernel = pytest.mark.skipif(compiled.cpu is None, reason=str(compiled.cpu_error))
needs_watch = pytest.mark.skipif(compiled.host is None, reason=str(compiled.host_error))
# the C++ kernel, where it has been built, and the reference
CPU_BACKENDS = (pytest.param("cpu", marks=needs_kernel), "reference")
PEAK = 0.05
SCHEDULE = fusedlr.linear(warmup_steps=3, total_steps=12, min_lr_ratio=0.1)
# with the ends: a scalar, and a tensor without elements
SHAPES = ((4, 3), (5,), (), (0,))


def make_params(
    dtypes: Iterable[torch.dtype] = (torch.float64,),
    shapes: Iterable[tuple[int, ...]] = SHAPES,
    device: str = "cpu",
) -> list[nn.Parameter]:
    """Parameters of every shape in every dtype."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [nn.Parameter(draw(shape).to(device, dtype)) for dtype in dtypes for shape in shapes]


def copied(params: Iterable[Tensor]) -> list[nn.Parameter]:
    """Parameters of their own with the same values."""
    return [nn.Parameter(p.detach().clone()) for p in params]


def make(params: Any = None, **options: Any) -> fusedlr.FusedAdamW:
    """An optimizer without a schedule."""
    params = make_params() if params is None else params
    return fusedlr.FusedAdamW(params, **{"lr": PEAK, **options})


def scheduled(params: Any = None, **options: Any) -> fusedlr.FusedAdamW:
    """An optimizer with `SCHEDULE`."""
    return make(params, **{"schedule": SCHEDULE, **options})


def two_groups(**options: Any) -> fusedlr.FusedAdamW:
    """An optimizer whose two groups have a peak and a schedule each."""
    params = make_params((torch.float32,))
    second = {"params": params[2:], "lr": 0.2, "schedule": fusedlr.linear(total_steps=7)}
    return scheduled([{"params": params[:2]}, second], **options)


def mixed(device: str = "cpu", backend: str = "auto", **options: Any) -> fusedlr.FusedAdamW:
    """An optimizer with `SCHEDULE` of fp32 and bf16 parameters, on a device and a backend."""
    params = make_params((torch.float32, torch.bfloat16), device=device)
    return scheduled(params, backend=backend, **options)


def make_stock(params: Any = None, **options: Any) -> torch.optim.AdamW:
    """torch's twin of `make`."""
    return torch.optim.AdamW(make_params() if params is None else params, **{"lr": PEAK, **options})


def set_grads(
    optimizer: Optimizer, k: int = 0, *, scale: float = 1.0, missing: Callable[[int, int], bool] | None = None
) -> None:
    """Give the gradients of step `k` to all parameters but frozen ones and those `missing`: (k, index).

    A power of two as `scale` leaves their digits alone.
    """
    generator = torch.Generator().manual_seed(100 + k)
    for i, p in enumerate(params_of(optimizer)):
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
        if p.requires_grad:
            p.grad = None if missing and missing(k, i) else grad.to(p.device, p.dtype)


def spoil(optimizer: Optimizer, value: float = math.inf, index: int = 0) -> None:
    """Put a value into a gradient, as an overflow does."""
    params_of(optimizer)[index].grad.view(-1)[0] = value


def skipped(optimizer: fusedlr.FusedAdamW) -> int:
    """How many steps were skipped."""
    return int(optimizer.metrics()["skipped"])


def step(optimizer: Optimizer, k: int = 0, **options: Any) -> None:
    """One step on the gradients of step `k`."""
    set_grads(optimizer, k, **options)
    optimizer.step()


def steps(optimizer: Optimizer, begin: int, end: int, **options: Any) -> None:
    """Steps `begin` to `end`, the last one left out."""
    for k in range(begin, end):
        step(optimizer, k, **options)


def with_rates(rates: Iterable[float], **options: Any) -> torch.optim.AdamW:
    """What torch's AdamW makes of these rates, one per step."""
    stock = make_stock(**options)
    for k, rate in enumerate(rates):
        stock.param_groups[0]["lr"] = rate
        step(stock, k)
    return stock


def assert_same(ours: Optimizer, stock: Optimizer) -> None:
    """Parameters and state agree in fp64."""
    for p, q in zip(params_of(ours), params_of(stock), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        entry, other = ours.state.get(p, {}), stock.state.get(q, {})
        assert entry.keys() == other.keys()
        for key in entry:
            torch.testing.assert_close(entry[key], other[key], rtol=1e-12, atol=1e-14)


def assert_steps_share_one_tensor(optimizer: fusedlr.FusedAdamW) -> None:
    """Every `step` in the state is a scalar, and a view of its own into one tensor."""
    views = [optimizer.state[p]["step"] for p in params_of(optimizer) if "step" in optimizer.state.get(p, {})]
    assert all(view.shape == () and view.dtype == torch.float32 for view in views)
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1
    # one scalar for all would be counted once per parameter by torch
    assert len({view.data_ptr() for view in views}) == len(views)


def torchs_part(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict as stock AdamW makes it."""
    return {key: value for key, value in state_dict.items() if key != "fusedlr"}


def through_a_file(state: Any) -> Any:
    """What comes back of a state that is saved and loaded as plain tensors and numbers."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@contextmanager
def recorded() -> Iterator[list[warnings.WarningMessage]]:
    """Every warning that code gives, once per time, but that nothing faster than the reference is built."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", fusedlr.FallbackWarning)
        yield caught


def disagreements(caught: list[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    """The warnings that a rate came from outside."""
    return [w for w in caught if "from outside" in str(w.message)]


class quiet(warnings.catch_warnings):
    """For code whose warnings are expected, and the matter of another test."""

    def __enter__(self) -> Any:
        super().__enter__()
        warnings.simplefilter("ignore")


class silent(warnings.catch_warnings):
    """For code that must not warn, but that nothing faster than the reference is built."""

    def __enter__(self) -> Any:
        super().__enter__()
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", fusedlr.FallbackWarning)


def module_at(path: Path) -> ModuleType:
    """A script of the tree as a module; what it does as a program is left out."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    # its dataclasses look for their annotations there
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def counters(optimizer: fusedlr.FusedAdamW) -> Counters:
    """The counts that the device keeps."""
    return optimizer._counts.counters


def uploaded_tables(optimizer: fusedlr.FusedAdamW) -> int:
    """How many tables of schedules are kept on the device."""
    return len(counters(optimizer).math._tables)


def rates_given(optimizer: fusedlr.FusedAdamW) -> bool:
    """Whether a rate from outside waits for the next step."""
    return bool(optimizer._notes.lr_assigned)


def is_allocated(optimizer: fusedlr.FusedAdamW) -> bool:
    """Whether the next step would make no tensor that stays."""
    kept = optimizer._planner._updates, optimizer._settings["kept"]
    return step_module.is_allocated(optimizer.param_groups, optimizer.state, *kept)


def prepare_anew(optimizer: fusedlr.FusedAdamW) -> None:
    """Let the next step find everything out again."""
    optimizer._planner.plan = None


def step_as_prepared(optimizer: fusedlr.FusedAdamW, only: Any = None) -> bool:
    """Make a step; returns whether it was made with the plan of the step before."""
    before = optimizer._planner.plan
    optimizer.step(only=only)
    return before is not None and optimizer._planner.plan is before


def stepper_of(optimizer: fusedlr.FusedAdamW) -> Stepper:
    """What makes the steps that are like the last."""
    return optimizer._planner.plan.stepper


class SlowArrival:
    """A copy that arrives when a test says so."""

    def __init__(self, source: Tensor) -> None:
        self.rows, self.here = source.clone().tolist(), False

    def values(self) -> list[Any] | None:
        """What `Arrival` gives."""
        return self.rows if self.here else None


def slow_arrivals(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[SlowArrival]:
    """The copies that a module starts from now on, as if from a GPU."""
    started: list[SlowArrival] = []

    def start(source: Tensor) -> SlowArrival:
        started.append(SlowArrival(source))
        return started[-1]

    monkeypatch.setattr(module, "Arrival", start)
    return started


@dataclass
class StepRow:
    """One parameter of a step that no optimizer makes, with its gradient and state."""

    param: Tensor
    grad: Tensor | None
    state: dict[str, Tensor]  # by the names of `columns.STATE`
    step: Tensor

    def tensors(self) -> list[Tensor]:
        """All that there are."""
        return [self.param, *([] if self.grad is None else [self.grad]), *self.state.values(), self.step]

    def of_group(self, index: int) -> Row:
        """What the backends are given."""
        self.param.grad = self.grad
        return Row.alone(index, self.param, self.state, self.step)


@dataclass
class StepGroup:
    """One param group of such a step."""

    rows: list[StepRow]
    lr: float | Tensor | fusedlr.Schedule = 0.01
    peak: float = math.nan
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    maximize: bool = False
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False

    def options(self, scope: int) -> GroupStep:
        """What the backends are given."""
        schedule = self.lr if isinstance(self.lr, fusedlr.Schedule) else None
        lr = self.lr if isinstance(self.lr, Tensor) else None
        rest = self.betas, self.eps, self.weight_decay, self.maximize
        return GroupStep(schedule, lr, self.peak, *rest, scope)


def stepper(backend: str, groups: list[StepGroup], counts: Counters, joint: bool = True) -> Stepper:
    """A backend's stepper for these groups."""
    rows = [row.of_group(i) for i, group in enumerate(groups) for row in group.rows]
    rates = [math.nan if isinstance(group.lr, fusedlr.Schedule) else group.lr for group in groups]
    made = backends.BACKENDS[backend].prepare(rows, counts, StepInputs(rows, rates))
    scoped = groups[:1] if joint else groups
    scopes = [Scope(group.max_grad_norm, group.skip_nonfinite, always=joint) for group in scoped]
    made.assign([group.options(0 if joint else i) for i, group in enumerate(groups)], scopes)
    return made


def run_step(
    backend: str, groups: list[StepGroup], counts: Counters, signals: Signals, joint: bool = True
) -> None:
    """One step of a backend on groups that no optimizer has made."""
    stepper(backend, groups, counts, joint).step(signals)
