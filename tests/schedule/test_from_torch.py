"""`from_torch`: tables of torch's schedulers, which are left alone, and what cannot be tabulated."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as lrs

import fusedlr

LR = 0.05
STEPS = 60


def adamw(groups: int = 1, **options: Any) -> torch.optim.Optimizer:
    params = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(groups)]
    return torch.optim.AdamW(params, **{"lr": LR, **options})


def sequential(optimizer: torch.optim.Optimizer) -> lrs.LRScheduler:
    parts = [lrs.LinearLR(optimizer, 0.1, total_iters=10), lrs.CosineAnnealingLR(optimizer, 40, eta_min=1e-3)]
    return lrs.SequentialLR(optimizer, parts, milestones=[10])


def nested(optimizer: torch.optim.Optimizer) -> lrs.LRScheduler:
    with warnings.catch_warnings():
        # SequentialLR steps a chain before any update
        warnings.simplefilter("ignore")
        return _nested(optimizer)


def _nested(optimizer: torch.optim.Optimizer) -> lrs.LRScheduler:
    chained = lrs.ChainedScheduler([lrs.ConstantLR(optimizer, 0.5, 5), lrs.ExponentialLR(optimizer, 0.9)])
    return lrs.SequentialLR(optimizer, [chained, lrs.StepLR(optimizer, 7, 0.7)], milestones=[20])


def warmup_then_root(k: int) -> float:
    return min(1.0, (k + 1) / 10) / math.sqrt(max(k, 10) / 10)


class Ramp:
    """A callable with a state that must not move."""

    calls = 0

    def __call__(self, k: int) -> float:
        self.calls += 1
        return k / 100


# name -> (the scheduler, the peak its table is relative to)
TORCH: dict[str, tuple[Any, float]] = {
    "LambdaLR": (lambda o: lrs.LambdaLR(o, warmup_then_root), LR),
    "LambdaLR, partial": (lambda o: lrs.LambdaLR(o, functools.partial(math.pow, 0.9)), LR),
    "LambdaLR, object": (lambda o: lrs.LambdaLR(o, Ramp()), LR),
    "LambdaLR, closure": (
        lambda o: lrs.LambdaLR(o, lambda k: 0.5 ** (k // len(o.param_groups[0]["params"]))),
        LR,
    ),
    "MultiplicativeLR": (lambda o: lrs.MultiplicativeLR(o, lambda k: 0.95), LR),
    "StepLR": (lambda o: lrs.StepLR(o, 7, 0.5), LR),
    "MultiStepLR": (lambda o: lrs.MultiStepLR(o, [5, 5, 20]), LR),
    "ConstantLR": (lambda o: lrs.ConstantLR(o, 0.25, 8), LR),
    "LinearLR": (lambda o: lrs.LinearLR(o, 0.1, 1.0, 15), LR),
    "LambdaLR, above the peak": (lambda o: lrs.LambdaLR(o, lambda k: 1 + k / 20), LR),
    "ExponentialLR": (lambda o: lrs.ExponentialLR(o, 0.97), LR),
    "PolynomialLR": (lambda o: lrs.PolynomialLR(o, 40, 2.0), LR),
    "CosineAnnealingLR": (lambda o: lrs.CosineAnnealingLR(o, 25, 1e-4), LR),
    "CosineAnnealingWarmRestarts": (lambda o: lrs.CosineAnnealingWarmRestarts(o, 7, 2, 1e-4), LR),
    "SWALR": (lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 12), LR),
    "SequentialLR": (sequential, LR),
    "ChainedScheduler": (
        lambda o: lrs.ChainedScheduler([lrs.LinearLR(o, 0.2, total_iters=9), lrs.ExponentialLR(o, 0.95)]),
        LR,
    ),
    "nested": (nested, LR),
    "OneCycleLR": (lambda o: lrs.OneCycleLR(o, 0.4, total_steps=STEPS, cycle_momentum=False), 0.4),
    "OneCycleLR, three phases": (
        lambda o: lrs.OneCycleLR(o, 0.4, total_steps=STEPS, cycle_momentum=False, three_phase=True),
        0.4,
    ),
    **{
        f"CyclicLR, {mode}": (
            lambda o, mode=mode: lrs.CyclicLR(o, 0.0, 0.3, 8, mode=mode, gamma=0.99, cycle_momentum=False),
            0.3,
        )
        for mode in ("triangular", "triangular2", "exp_range")
    },
    "CyclicLR, scale_fn": (
        lambda o: lrs.CyclicLR(o, 0.01, 0.3, 8, scale_fn=lambda x: 1 / x, cycle_momentum=False),
        0.3,
    ),
}


def rates(scheduler: lrs.LRScheduler, steps: int) -> list[float]:
    """What the scheduler itself gives `steps` updates."""
    seen = []
    for _ in range(steps):
        seen.append(float(scheduler.optimizer.param_groups[0]["lr"]))
        scheduler.optimizer.step()
        with warnings.catch_warnings():
            # SequentialLR passes a deprecated argument to the parts of a nested one
            warnings.simplefilter("ignore")
            scheduler.step()
    return seen


def seen(scheduler: lrs.LRScheduler) -> Any:
    """All there is to see of a scheduler and its optimizer, to compare before and after."""
    optimizer = scheduler.optimizer
    return [
        [seen(part) for part in getattr(scheduler, "_schedulers", ())],
        {key: unaliased(value) for key, value in vars(scheduler).items() if key != "optimizer"},
        [vars(f).copy() for f in getattr(scheduler, "lr_lambdas", ()) if isinstance(f, Ramp)],
        [{**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups],
        # hooks, state, and the wrapper that torch's scheduler puts around step
        {key: unaliased(value) for key, value in vars(optimizer).items() if key != "param_groups"},
    ]


def unaliased(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict)) else value


@pytest.mark.parametrize("name", TORCH)
def test_from_torch(name: str) -> None:
    build, peak = TORCH[name]
    schedule = fusedlr.from_torch(build(adamw()), STEPS)
    want = rates(build(adamw()), STEPS)
    assert [schedule.lr_at(k, peak) for k in range(STEPS)] == pytest.approx(want, rel=1e-14, abs=1e-300)
    assert schedule.total_steps == STEPS
    assert schedule.lr_at(10**6) == schedule.lr_at(STEPS - 1)


@pytest.mark.parametrize("name", TORCH)
def test_from_torch_leaves_everything_alone(name: str) -> None:
    scheduler = TORCH[name][0](adamw(groups=2))
    before = seen(scheduler)
    fusedlr.from_torch(scheduler, STEPS)
    assert seen(scheduler) == before


class Model:
    """Owns a method used as lr_lambda; a copy of it would be a copy of everything."""

    def __init__(self) -> None:
        self.frozen = torch.nn.Parameter(torch.ones(3))

    def ramp(self, k: int) -> float:
        return 1 / (1 + k)

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the model is copied")


class Precious(torch.nn.Parameter):
    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("a parameter is copied")


@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial], ids=["method", "partial"])
def test_from_torch_copies_nothing_of_the_model(wrap: Any) -> None:
    model = Model()
    optimizer = torch.optim.AdamW([Precious(torch.ones(2))], lr=LR)
    scheduler = lrs.LambdaLR(optimizer, wrap(model.ramp))
    # some schedulers keep parameters
    scheduler.watched = optimizer.param_groups[0]["params"]
    schedule = fusedlr.from_torch(scheduler, 3)
    assert [schedule.lr_at(k) for k in range(3)] == [1, 1 / 2, 1 / 3]


def test_from_torch_groups_of_different_rates() -> None:
    def optimizer() -> torch.optim.Optimizer:
        params = [torch.nn.Parameter(torch.ones(1)) for _ in range(4)]
        groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (LR, 10 * LR, 0.0, LR / 7), strict=True)]
        # a tensor rate is read, and not written to
        groups[1]["lr"] = torch.tensor(10 * LR)
        return torch.optim.AdamW(groups, lr=1.0)

    scheduler = lrs.CosineAnnealingLR(optimizer(), 20)
    before = seen(scheduler)
    schedule = fusedlr.from_torch(scheduler, 20)
    assert repr(seen(scheduler)) == repr(before)
    assert [schedule.lr_at(k, LR) for k in range(20)] == pytest.approx(
        rates(lrs.CosineAnnealingLR(optimizer(), 20), 20)
    )


def test_from_torch_table_drives_the_optimizer_as_the_scheduler_does() -> None:
    scheduler = sequential(adamw())
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = fusedlr.FusedAdamW([p], lr=LR, schedule=fusedlr.from_torch(scheduler, 30))
    given = []
    for _ in range(30):
        p.grad = torch.ones(2)
        optimizer.step()
        given.append(optimizer.param_groups[0]["lr"])
    assert given == pytest.approx(rates(sequential(adamw()), 30), rel=1e-14)


def stepped(scheduler: lrs.LRScheduler) -> lrs.LRScheduler:
    scheduler.optimizer.step()
    scheduler.step()
    return scheduler


def view(optimizer: torch.optim.Optimizer) -> lrs.LRScheduler:
    return fusedlr.FusedAdamW(optimizer.param_groups[0]["params"], schedule=fusedlr.constant()).scheduler


NOT_TABULATED = {
    "plateau": (
        lambda o: lrs.ReduceLROnPlateau(o),
        "scheduler=ReduceLROnPlateau follows a metric, not the step",
    ),
    "one cycle": (
        lambda o: lrs.OneCycleLR(o, 0.1, total_steps=9),
        "scheduler=OneCycleLR also cycles momentum, which a learning rate schedule cannot",
    ),
    "cyclic": (lambda o: lrs.CyclicLR(o, 0.1, 0.2), "pass cycle_momentum=False"),
    "cycler in a sequence": (
        lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o), lrs.CyclicLR(o, 0.1, 0.2)], [3]),
        "scheduler=CyclicLR also cycles momentum",
    ),
    "stepped": (
        lambda o: stepped(lrs.ExponentialLR(o, 0.9)),
        r"scheduler=ExponentialLR has been stepped \(last_epoch=1\): pass a fresh one",
    ),
    "stepped chain": (
        lambda o: stepped(lrs.ChainedScheduler([lrs.ExponentialLR(o, 0.9)])),
        r"scheduler=ExponentialLR has been stepped \(last_epoch=1\)",
    ),
    "view": (view, r"scheduler=ScheduleView shows a fusedlr schedule: take it from group\['schedule'\]"),
    "rate 0": (lambda o: lrs.ExponentialLR(adamw(lr=0.0), 0.9), r"all 0, the peak of every group is \[0.0\]"),
}


@pytest.mark.parametrize("name", NOT_TABULATED)
def test_from_torch_refuses(name: str) -> None:
    build, message = NOT_TABULATED[name]
    with pytest.raises(ValueError, match=message):
        fusedlr.from_torch(build(adamw()), STEPS)


def test_from_torch_refuses_groups_that_part() -> None:
    scheduler = lrs.LambdaLR(adamw(groups=2), [lambda k: 1.0, lambda k: 1.0 if k < 4 else 0.5])
    assert fusedlr.from_torch(scheduler, 4) == fusedlr.table([1.0] * 4)
    with pytest.raises(
        ValueError, match=r"different ratios of their peak at step 4: \[1.0, 0.5\]; build one"
    ):
        fusedlr.from_torch(scheduler, 5)


@pytest.mark.parametrize("other", [None, 3, warmup_then_root], ids=["None", "3", "function"])
def test_from_torch_wants_a_scheduler(other: Any) -> None:
    with pytest.raises(TypeError, match="is not a torch LRScheduler"):
        fusedlr.from_torch(other, STEPS)


@pytest.mark.parametrize("steps", [0, -1, 2.5, None])
def test_from_torch_wants_a_length(steps: Any) -> None:
    with pytest.raises(ValueError, match="total_steps"):
        fusedlr.from_torch(lrs.ExponentialLR(adamw(), 0.9), steps)


def test_from_torch_asks_for_no_step_past_the_run() -> None:
    values = (1.0, 0.5, 0.25)
    scheduler = lrs.LambdaLR(adamw(), values.__getitem__)
    assert fusedlr.from_torch(scheduler, 3) == fusedlr.table(values)
    with pytest.raises(IndexError):
        fusedlr.from_torch(scheduler, 4)
