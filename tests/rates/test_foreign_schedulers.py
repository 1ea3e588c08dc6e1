"""Schedulers of torch and transformers drive the optimizer as they drive AdamW, also over a schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kit import (
    PEAK,
    SCHEDULE,
    assert_same,
    disagreements,
    make,
    make_params,
    make_stock,
    quiet,
    recorded,
    scheduled,
    step,
    with_rates,
)
from torch.optim import lr_scheduler

import fusedlr

Make = Callable[[torch.optim.Optimizer], Any]

FOREIGN: dict[str, Make] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, milestones=[2, 5]),
    "constant": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6, power=2.0),
    # these two write betas as well
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, factor=0.1), lr_scheduler.ExponentialLR(o, gamma=0.9)], milestones=[3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.1), lr_scheduler.ExponentialLR(o, gamma=0.9)]
    ),
}


def drive(optimizer: torch.optim.Optimizer, make_scheduler: Make, steps: int = 9) -> list[float]:
    """Rates that a foreign scheduler reports while it drives the optimizer."""
    scheduler = make_scheduler(optimizer)
    seen = []
    for k in range(steps):
        step(optimizer, k)
        seen.append(float(scheduler.get_last_lr()[0]))
        scheduler.step()
    return seen


@pytest.mark.parametrize("name", FOREIGN)
def test_torch_schedulers_drive_it_as_they_drive_adamw(name):
    ours, stock = make(), make_stock()
    with recorded() as caught:
        assert drive(ours, FOREIGN[name]) == drive(stock, FOREIGN[name])
    assert not disagreements(caught)
    assert_same(ours, stock)


@pytest.mark.parametrize("name", FOREIGN)
def test_torch_schedulers_on_top_of_a_schedule_are_obeyed_and_reported_once(name):
    ours, stock = scheduled(), make_stock()
    with recorded() as caught:
        # some scale the rate they find, others start from `initial_lr`: both begin where stock begins
        ours.param_groups[0]["lr"] = PEAK
        stock.param_groups[0]["initial_lr"] = PEAK
        seen = drive(ours, FOREIGN[name])
    assert seen == drive(stock, FOREIGN[name])
    assert len(disagreements(caught)) == 1
    assert_same(ours, stock)


def plateau(optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for k, loss in enumerate(losses):
        step(optimizer, k)
        scheduler.step(loss)


def test_reduce_on_plateau_drives_it_as_it_drives_adamw():
    ours, stock = make(), make_stock()
    for optimizer in (ours, stock):
        plateau(optimizer, [3.0, 4.0, 4.0, 2.0, 4.0, 4.0])
    assert ours.param_groups[0]["lr"] == stock.param_groups[0]["lr"] < PEAK
    assert_same(ours, stock)


def test_reduce_on_plateau_on_top_of_a_schedule_halves_single_steps():
    optimizer = scheduled()
    with recorded() as caught:
        plateau(optimizer, [3.0, 2.0, 2.5, 1.0, 0.5])
    rates = [SCHEDULE.lr_at(k, PEAK) for k in range(5)]
    # it halved the rate just used, after step 2
    rates[3] = rates[2] / 2
    assert len(disagreements(caught)) == 1
    assert_same(optimizer, with_rates(rates))


HF = [
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_restarts",
]


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("warmup", [0, 3])
def test_transformers_schedulers_drive_it_as_they_drive_adamw(name, warmup):
    transformers = pytest.importorskip("transformers")

    def get_scheduler(optimizer: torch.optim.Optimizer) -> Any:
        return transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)

    ours, stock = make(), make_stock()
    assert drive(ours, get_scheduler) == drive(stock, get_scheduler)
    assert_same(ours, stock)


@pytest.mark.parametrize("name", HF)
def test_a_transformers_scheduler_beside_the_same_schedule_of_ours_is_no_disagreement(name):
    transformers = pytest.importorskip("transformers")

    def get_scheduler(optimizer: torch.optim.Optimizer) -> Any:
        # without a warm-up inverse_sqrt wants its time scale
        options = {"timescale": 4} if name == "inverse_sqrt" else {}
        return transformers.get_scheduler(
            name, optimizer, num_warmup_steps=0, num_training_steps=10, scheduler_specific_kwargs=options
        )

    options = {"timescale": 4} if name == "inverse_sqrt" else {}
    schedule = fusedlr.from_hf(name, num_warmup_steps=0, num_training_steps=10, lr=PEAK, **options)
    ours, stock = make(schedule=schedule), make_stock()
    with recorded() as caught:
        assert drive(ours, get_scheduler) == drive(stock, get_scheduler)
    assert not disagreements(caught)
    assert ours.metrics()["step"].tolist() == [9]
    assert_same(ours, stock)


def test_a_foreign_warmup_from_zero_is_no_allocating_step():
    """A checkpoint tool's step has the same rate and no state before it, but its gradients are zero."""
    ours, stock = scheduled(), make_stock()
    with quiet():
        rates = drive(ours, lambda o: lr_scheduler.LambdaLR(o, SCHEDULE.lr_at))
    assert rates == drive(stock, lambda o: lr_scheduler.LambdaLR(o, SCHEDULE.lr_at))
    assert_same(ours, stock)
    assert ours.metrics()["step"].tolist() == [9]


def test_the_schedule_and_its_view_give_what_lambda_lr_gives():
    ours, stock = scheduled(), make_stock()
    assert drive(ours, lambda o: o.scheduler) == drive(
        stock, lambda o: lr_scheduler.LambdaLR(o, SCHEDULE.lr_at)
    )
    assert_same(ours, stock)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("name", ["lambda", "cosine", "onecycle"])
def test_torch_schedulers_fill_a_tensor_rate(name, shape):
    ours = fusedlr.FusedAdamW(make_params(), lr=torch.full(shape, PEAK, dtype=torch.float64))
    stock = make_stock()
    assert drive(ours, FOREIGN[name]) == pytest.approx(drive(stock, FOREIGN[name]), rel=1e-12)
    assert_same(ours, stock)
