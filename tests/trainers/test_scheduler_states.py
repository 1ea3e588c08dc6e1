"""The view has what tools read of `LambdaLR`, and knows states of schedulers that count something else."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import fusedlr

LR, EPOCH, EPOCHS = 0.1, 5, 4
TOTAL = EPOCH * EPOCHS


def make(schedule: Any, steps: int = 0, groups: int = 1) -> Any:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(groups)]
    optimizer = fusedlr.FusedAdamW(
        [{"params": [p], "lr": LR * (i + 1)} for i, p in enumerate(params)], lr=LR, schedule=schedule
    )
    for _ in range(steps):
        for p in params:
            p.grad = torch.ones(2)
        optimizer.step()
    return optimizer


def test_lr_lambdas_are_the_rate_in_units_of_the_peak():
    schedule = fusedlr.cosine(warmup_steps=2, total_steps=10)
    view = make(schedule, groups=2).scheduler
    assert len(view.lr_lambdas) == 2
    for function, peak in zip(view.lr_lambdas, view.base_lrs, strict=True):
        assert isinstance(function, partial)
        for k in range(12):
            assert function(k) * peak == pytest.approx(schedule.lr_at(k, peak), abs=1e-15)
    # a state of LambdaLR has None for functions that are no objects
    assert view.state_dict()["lr_lambdas"] == [None, None]


def test_lr_lambdas_of_an_absolute_floor_and_of_no_schedule():
    optimizer = make(fusedlr.cosine(0, 10, min_lr=LR / 4))
    assert optimizer.scheduler.lr_lambdas[0](10) == pytest.approx(0.25)
    assert make(None).scheduler.lr_lambdas[0](7) == 1.0


def stepped_per_epoch(kind: str) -> tuple[Any, Any]:
    """A torch scheduler that has seen two epochs, and the schedule that gives the same in updates."""
    stock = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=LR)
    if kind == "StepLR":
        scheduler: Any = lr_scheduler.StepLR(stock, step_size=1, gamma=0.5)
        schedule = fusedlr.table(lambda k: 0.5 ** (k // EPOCH), TOTAL)
    else:
        scheduler = lr_scheduler.CosineAnnealingLR(stock, T_max=EPOCHS)
        schedule = fusedlr.table(lambda k: fusedlr.cosine(0, EPOCHS).lr_at(k // EPOCH), TOTAL)
    for _ in range(2):
        stock.step()
        scheduler.step()
    return scheduler, schedule


@pytest.mark.parametrize("kind", ["StepLR", "CosineAnnealingLR"])
def test_a_state_that_counts_epochs_does_not_send_the_schedule_back(kind):
    scheduler, schedule = stepped_per_epoch(kind)
    optimizer = make(schedule, steps=2 * EPOCH)
    with pytest.warns(UserWarning, match=r"last_epoch=2 .* does not count updates: .* k = 10, where this"):
        optimizer.scheduler.load_state_dict(scheduler.state_dict())
    assert optimizer.metrics()["step"].tolist() == [2 * EPOCH]
    optimizer.scheduler.step()
    assert optimizer.scheduler.get_last_lr() == pytest.approx(scheduler.get_last_lr())


@pytest.mark.parametrize("kind", ["StepLR", "CosineAnnealingLR"])
def test_where_the_optimizer_knows_nothing_better_the_disagreement_is_told(kind):
    scheduler, schedule = stepped_per_epoch(kind)
    optimizer = make(schedule)
    with pytest.warns(UserWarning, match=r"group 0: at k = 2 the checkpoint's scheduler gives 0\.\d+ of the"):
        optimizer.scheduler.load_state_dict(scheduler.state_dict())
    assert optimizer.scheduler.last_epoch == 2


@pytest.mark.parametrize("kind", ["LambdaLR", "LinearLR", "OneCycleLR", "SequentialLR", "PolynomialLR"])
def test_a_state_that_counts_updates_loads_without_a_word(kind):
    stock = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=LR)
    makers: dict[str, Any] = {
        "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
        "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=TOTAL),
        "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, LR, TOTAL, cycle_momentum=False),
        "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, TOTAL, power=2.0),
        "SequentialLR": lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
        ),
    }
    scheduler = makers[kind](stock)
    fresh = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=LR)
    optimizer = make(fusedlr.from_torch(makers[kind](fresh), TOTAL))
    for _ in range(7):
        stock.step()
        with warnings.catch_warnings():
            # torch's own, of its SequentialLR
            warnings.simplefilter("ignore", UserWarning)
            scheduler.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.scheduler.load_state_dict(scheduler.state_dict())
    assert optimizer.scheduler.get_last_lr() == pytest.approx(scheduler.get_last_lr(), rel=1e-9)


@pytest.mark.parametrize(
    ("lr", "rates", "bases", "told"),
    [
        (LR, [0.9 * LR], [LR], True),
        # what its scheduler calls the base need not be the peak
        (LR, [LR], [2 * LR], False),
        (LR, [LR / 2], [2 * LR], False),
        # nothing to compare with, or nothing that says of which groups the rates are
        (0.0, [0.0], [0.0], False),
        (LR, [LR, LR], [LR, LR], False),
        (LR, [0.9 * LR], [], True),
        (LR, [LR / 2], [], False),
    ],
)
def test_a_rate_is_compared_with_what_it_may_be_relative_to(lr, rates, bases, told):
    optimizer = make(fusedlr.table([1.0, 0.75, 0.5]))
    optimizer.param_groups[0]["initial_lr"] = lr
    state = {"last_epoch": 2, "_last_lr": rates, "base_lrs": bases}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer.scheduler.load_state_dict(state)
    assert len(seen) == told
    assert optimizer.metrics()["step"].tolist() == [2]


def test_a_group_without_a_schedule_is_not_compared():
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)]
    groups[1]["schedule"] = fusedlr.table([1.0, 0.75, 0.5])
    optimizer = fusedlr.FusedAdamW(groups, lr=LR)
    rates = [0.9 * LR, 0.9 * LR]
    with pytest.warns(UserWarning) as seen:
        optimizer.scheduler.load_state_dict({"last_epoch": 2, "_last_lr": rates, "base_lrs": [LR, LR]})
    assert "group 1" in str(seen[0].message) and "group 0" not in str(seen[0].message)
