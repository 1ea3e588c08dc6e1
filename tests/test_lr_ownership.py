"""Who owns `group["lr"]`: the schedule, whoever wrote it last, and what trainers and loggers read."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from snapshots import bits, changes, params_of, snapshot
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import lr_scheduler

import fusedlr

PEAK = 0.05
SCHEDULE = fusedlr.linear(warmup_steps=3, total_steps=12, min_lr_ratio=0.1)


def make_params(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((4, 3), (5,))]


def make(schedule: fusedlr.Schedule | None = SCHEDULE, **options: Any) -> fusedlr.FusedAdamW:
    return fusedlr.FusedAdamW(make_params(), lr=PEAK, schedule=schedule, **options)


def make_stock(lr: Any = PEAK, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(make_params(), lr=lr, **options)


def set_grads(optimizer: torch.optim.Optimizer, k: int) -> None:
    generator = torch.Generator().manual_seed(100 + k)
    for p in params_of(optimizer):
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def step(optimizer: torch.optim.Optimizer, k: int) -> None:
    set_grads(optimizer, k)
    optimizer.step()


def assert_same_weights(ours: torch.optim.Optimizer, stock: torch.optim.Optimizer) -> None:
    for p, q in zip(params_of(ours), params_of(stock), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def with_rates(rates: list[float]) -> torch.optim.AdamW:
    """What stock AdamW makes of these rates, one per step."""
    stock = make_stock()
    for k, rate in enumerate(rates):
        stock.param_groups[0]["lr"] = rate
        step(stock, k)
    return stock


class quiet(warnings.catch_warnings):
    """Where a warning about a foreign scheduler is expected and not the point."""

    def __enter__(self) -> Any:
        super().__enter__()
        warnings.simplefilter("ignore")


def disagreements(caught: list[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    return [w for w in caught if "from outside" in str(w.message)]


# --- what the group shows


def test_the_group_shows_the_rate_just_used_then_the_next():
    optimizer = make()
    group = optimizer.param_groups[0]
    assert group["initial_lr"] == PEAK
    for k in range(14):
        # before the step: the rate it is going to use
        assert group["lr"] == optimizer.scheduler.get_last_lr()[0] == SCHEDULE.lr_at(k, PEAK)
        step(optimizer, k)
        assert group["lr"] == optimizer.scheduler.get_last_lr()[0] == SCHEDULE.lr_at(k, PEAK)
        assert optimizer.metrics()["lr"].item() == pytest.approx(SCHEDULE.lr_at(k, PEAK), rel=1e-15)
        optimizer.scheduler.step()
        assert type(group["lr"]) is float


def test_the_next_step_moves_the_rate_on_when_nobody_steps_the_scheduler():
    optimizer = make()
    shown = []
    for k in range(14):
        step(optimizer, k)
        shown.append(optimizer.param_groups[0]["lr"])
    assert shown == [SCHEDULE.lr_at(k, PEAK) for k in range(14)]
    assert_same_weights(optimizer, with_rates(shown))


def test_every_group_has_its_own_peak_and_schedule():
    a, b = make_params()
    c = nn.Parameter(torch.ones(2))
    other = fusedlr.cosine(total_steps=7)
    optimizer = fusedlr.FusedAdamW(
        [{"params": [a]}, {"params": [b], "lr": 1.0, "schedule": other}, {"params": [c], "schedule": None}],
        lr=PEAK,
        schedule=SCHEDULE,
    )
    assert optimizer.scheduler.base_lrs == [PEAK, 1.0, PEAK]
    for k in range(4):
        step(optimizer, k)
        assert optimizer.scheduler.get_last_lr() == [SCHEDULE.lr_at(k, PEAK), other.lr_at(k), PEAK]


def test_without_a_schedule_the_groups_are_torchs():
    ours, stock = make(None), make_stock()
    for optimizer in (ours, stock):
        step(optimizer, 0)
    assert bits(ours.state_dict()["param_groups"]) == bits(stock.state_dict()["param_groups"])


def test_an_absolute_level_is_one_factor_for_all_groups():
    a, b = make_params()
    schedule = fusedlr.linear(total_steps=10, min_lr=PEAK / 10)
    optimizer = fusedlr.FusedAdamW([{"params": [a]}, {"params": [b], "lr": 1.0}], lr=PEAK, schedule=schedule)
    for k in range(12):
        step(optimizer, k)
    assert optimizer.scheduler.get_last_lr() == pytest.approx([PEAK / 10, 0.1], rel=1e-12)


def test_a_peak_changed_while_training_is_used_at_once():
    optimizer = make()
    step(optimizer, 0)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    step(optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == SCHEDULE.lr_at(1, 1.0)


# --- the last writer wins


def set_item(group: dict, lr: Any) -> None:
    group["lr"] = lr


def set_by_update(group: dict, lr: Any) -> None:
    group.update(lr=lr)


def set_by_mapping(group: dict, lr: Any) -> None:
    group.update({"eps": group["eps"], "lr": lr})


def set_by_pairs(group: dict, lr: Any) -> None:
    group.update([("lr", lr)])


def set_by_or(group: dict, lr: Any) -> None:
    group |= {"lr": lr}


def set_by_default(group: dict, lr: Any) -> None:
    del group["lr"]
    group.setdefault("lr", lr)


WRITES = [set_item, set_by_update, set_by_mapping, set_by_pairs, set_by_or, set_by_default]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("lr", [0.3, 0, 0.0, torch.tensor(0.3)], ids=str)
def test_a_rate_written_from_outside_is_used_for_the_next_step(write, lr):
    optimizer = make()
    step(optimizer, 0)
    step(optimizer, 1)
    write(optimizer.param_groups[0], lr)
    with quiet():
        step(optimizer, 2)
    step(optimizer, 3)
    rates = [SCHEDULE.lr_at(k, PEAK) for k in range(4)]
    rates[2] = float(lr)
    assert_same_weights(optimizer, with_rates(rates))
    # it was a step of the run, and the schedule has its group back
    assert optimizer.metrics()["step"].tolist() == [4]
    assert optimizer.param_groups[0]["lr"] == rates[3]


def test_a_rate_may_be_written_before_the_first_step():
    optimizer = make()
    optimizer.param_groups[0]["lr"] = 0.3
    with quiet():
        step(optimizer, 0)
    assert_same_weights(optimizer, with_rates([0.3]))
    assert optimizer.metrics()["step"].tolist() == [1]


def test_a_present_rate_is_not_written_by_setdefault():
    optimizer = make()
    assert optimizer.param_groups[0].setdefault("lr", 0.3) == 0.0
    step(optimizer, 0)
    assert_same_weights(optimizer, with_rates([0.0]))


@pytest.mark.parametrize("write", WRITES)
def test_a_rate_written_again_unchanged_is_a_write(write):
    """A scheduler that holds a rate writes the same number every step."""
    optimizer = make()
    for k in range(3):
        step(optimizer, k)
    held = optimizer.param_groups[0]["lr"]
    write(optimizer.param_groups[0], held)
    with quiet():
        step(optimizer, 3)
    assert_same_weights(optimizer, with_rates([SCHEDULE.lr_at(k, PEAK) for k in range(3)] + [held]))


def test_the_schedulers_step_after_a_write_is_the_last_writer():
    optimizer = make()
    step(optimizer, 0)
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.scheduler.step()
    assert optimizer.param_groups[0]["lr"] == SCHEDULE.lr_at(1, PEAK)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(optimizer, 1)
    assert not disagreements(caught)
    assert_same_weights(optimizer, with_rates([SCHEDULE.lr_at(k, PEAK) for k in range(2)]))


def test_other_keys_may_be_written_freely():
    optimizer = make()
    optimizer.param_groups[0]["weight_decay"] = 0.5
    optimizer.param_groups[0].update(eps=1e-3)
    step(optimizer, 0)
    step(optimizer, 1)
    stock = make_stock(weight_decay=0.5, eps=1e-3)
    for k in range(2):
        stock.param_groups[0]["lr"] = SCHEDULE.lr_at(k, PEAK)
        step(stock, k)
    assert_same_weights(optimizer, stock)


def test_only_the_group_that_was_written_is_driven_from_outside():
    a, b = make_params()
    optimizer = fusedlr.FusedAdamW([{"params": [a]}, {"params": [b]}], lr=PEAK, schedule=SCHEDULE)
    step(optimizer, 0)
    optimizer.param_groups[1]["lr"] = 0.3
    with quiet():
        step(optimizer, 1)
    assert optimizer.metrics()["lr"].tolist() == pytest.approx([SCHEDULE.lr_at(1, PEAK), 0.3], rel=1e-15)


def test_a_written_rate_survives_a_group_that_is_added():
    optimizer = make()
    step(optimizer, 0)
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert optimizer.param_groups[0]["lr"] == 0.3
    with quiet():
        step(optimizer, 1)
    assert optimizer.metrics()["lr"].tolist() == [0.3, 0.0]


def plain_copy(group: dict) -> dict:
    return dict(group)


@pytest.mark.parametrize(
    "copied", [plain_copy, copy.copy, copy.deepcopy, dict.copy], ids=lambda f: f.__qualname__
)
def test_plain_dicts_put_into_param_groups_are_watched_again(copied):
    optimizer = make()
    step(optimizer, 0)
    group = copied(optimizer.param_groups[0])
    assert type(group) is dict
    # a deep copy has parameters of its own
    group["params"] = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0] = group
    step(optimizer, 1)
    assert_same_weights(optimizer, with_rates([SCHEDULE.lr_at(k, PEAK) for k in range(2)]))
    optimizer.param_groups[0]["lr"] = 0.3
    with quiet():
        step(optimizer, 2)
    assert optimizer.metrics()["lr"].item() == 0.3


def test_a_plain_dict_with_another_rate_was_written_from_outside():
    optimizer = make()
    step(optimizer, 0)
    optimizer.param_groups = [{**group, "lr": 0.3} for group in optimizer.param_groups]
    with quiet():
        step(optimizer, 1)
    assert_same_weights(optimizer, with_rates([SCHEDULE.lr_at(0, PEAK), 0.3]))


def test_a_plain_dict_may_bring_a_schedule():
    optimizer = make(None)
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "schedule": fusedlr.linear(total_steps=4)}
    for k in range(4):
        step(optimizer, k)
    assert_same_weights(optimizer, with_rates([PEAK * (4 - k) / 4 for k in range(4)]))


def test_a_schedule_given_to_a_running_group_takes_over():
    optimizer = make(None)
    step(optimizer, 0)
    optimizer.param_groups[0]["schedule"] = fusedlr.linear(total_steps=4)
    step(optimizer, 1)
    assert_same_weights(optimizer, with_rates([PEAK, PEAK * 3 / 4]))


# --- one warning


def test_one_warning_in_all_names_both_rates_and_points_at_the_caller():
    optimizer = make()
    step(optimizer, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(1, 6):
            optimizer.param_groups[0]["lr"] = 0.3
            step(optimizer, k)
    (warning,) = disagreements(caught)
    assert "lr=0.3 was assigned to group 0 from outside" in str(warning.message)
    assert f"gives {SCHEDULE.lr_at(1, PEAK):g}" in str(warning.message)
    assert "schedule=None" in str(warning.message)
    assert warning.filename == __file__


def test_no_warning_where_the_foreign_rate_is_the_schedules():
    optimizer = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(optimizer, 0)
        for k in range(1, 8):
            # as another formula would round it
            optimizer.param_groups[0]["lr"] = SCHEDULE.lr_at(k, PEAK) * (1 + 1e-15)
            step(optimizer, k)
    assert not disagreements(caught)


def test_no_warning_without_a_schedule():
    optimizer = make(None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(3):
            optimizer.param_groups[0]["lr"] = 0.3 / (k + 1)
            step(optimizer, k)
    assert not disagreements(caught)
    assert_same_weights(optimizer, with_rates([0.3 / (k + 1) for k in range(3)]))


# --- schedulers of others

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
    ours, stock = make(None), make_stock()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert drive(ours, FOREIGN[name]) == drive(stock, FOREIGN[name])
    assert not disagreements(caught)
    assert_same_weights(ours, stock)


@pytest.mark.parametrize("name", FOREIGN)
def test_torch_schedulers_on_top_of_a_schedule_are_obeyed_and_reported_once(name):
    ours, stock = make(), make_stock()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # some scale the rate they find, others start from `initial_lr`: both begin where stock begins
        ours.param_groups[0]["lr"] = PEAK
        stock.param_groups[0]["initial_lr"] = PEAK
        seen = drive(ours, FOREIGN[name])
    assert seen == drive(stock, FOREIGN[name])
    assert len(disagreements(caught)) == 1
    assert_same_weights(ours, stock)


def plateau(optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for k, loss in enumerate(losses):
        step(optimizer, k)
        scheduler.step(loss)


def test_reduce_on_plateau_drives_it_as_it_drives_adamw():
    ours, stock = make(None), make_stock()
    for optimizer in (ours, stock):
        plateau(optimizer, [3.0, 4.0, 4.0, 2.0, 4.0, 4.0])
    assert ours.param_groups[0]["lr"] == stock.param_groups[0]["lr"] < PEAK
    assert_same_weights(ours, stock)


def test_reduce_on_plateau_on_top_of_a_schedule_halves_single_steps():
    optimizer = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plateau(optimizer, [3.0, 2.0, 2.5, 1.0, 0.5])
    rates = [SCHEDULE.lr_at(k, PEAK) for k in range(5)]
    # it halved the rate just used, after step 2
    rates[3] = rates[2] / 2
    assert len(disagreements(caught)) == 1
    assert_same_weights(optimizer, with_rates(rates))


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

    ours, stock = make(None), make_stock()
    assert drive(ours, get_scheduler) == drive(stock, get_scheduler)
    assert_same_weights(ours, stock)


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
    ours, stock = make(schedule), make_stock()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert drive(ours, get_scheduler) == drive(stock, get_scheduler)
    assert not disagreements(caught)
    assert ours.metrics()["step"].tolist() == [9]
    assert_same_weights(ours, stock)


def test_a_foreign_warmup_from_zero_looks_like_an_allocating_step():
    """The price of telling a checkpoint tool's step apart: rates are obeyed, our own count is one behind."""
    ours, stock = make(), make_stock()
    with quiet():
        rates = drive(ours, lambda o: lr_scheduler.LambdaLR(o, SCHEDULE.lr_at))
    assert rates == drive(stock, lambda o: lr_scheduler.LambdaLR(o, SCHEDULE.lr_at))
    assert_same_weights(ours, stock)
    assert ours.metrics()["step"].tolist() == [8]


def test_the_schedule_and_its_view_give_what_lambda_lr_gives():
    ours, stock = make(), make_stock()
    assert drive(ours, lambda o: o.scheduler) == drive(
        stock, lambda o: lr_scheduler.LambdaLR(o, SCHEDULE.lr_at)
    )
    assert_same_weights(ours, stock)


# --- tensors as rates


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_rate_is_read_at_every_step(shape):
    lr = torch.full(shape, PEAK)
    ours = fusedlr.FusedAdamW(make_params(), lr=lr)
    stock = make_stock(float(torch.tensor(PEAK)))
    step(ours, 0)
    step(stock, 0)
    # in place: nothing is assigned, and the tensor is the one that was passed
    lr.fill_(0.25)
    stock.param_groups[0]["lr"] = 0.25
    step(ours, 1)
    step(stock, 1)
    assert ours.param_groups[0]["lr"] is lr
    assert ours.scheduler.get_last_lr() == [0.25]
    assert_same_weights(ours, stock)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("name", ["lambda", "cosine", "onecycle"])
def test_torch_schedulers_fill_a_tensor_rate(name, shape):
    ours = fusedlr.FusedAdamW(make_params(), lr=torch.full(shape, PEAK, dtype=torch.float64))
    stock = make_stock()
    assert drive(ours, FOREIGN[name]) == pytest.approx(drive(stock, FOREIGN[name]), rel=1e-12)
    assert_same_weights(ours, stock)


def test_groups_may_differ_in_tensor_rates():
    a, b = make_params()
    optimizer = fusedlr.FusedAdamW([{"params": [a], "lr": torch.tensor(0.25)}, {"params": [b]}], lr=PEAK)
    step(optimizer, 0)
    assert optimizer.metrics()["lr"].tolist() == [0.25, PEAK]


def test_a_schedule_with_a_tensor_rate_is_refused():
    with pytest.raises(ValueError, match=r"lr=tensor\(0\.05.*is a tensor, which a schedule cannot drive"):
        fusedlr.FusedAdamW(make_params(), lr=torch.tensor(PEAK), schedule=SCHEDULE)
    a, b = make_params()
    groups = [{"params": [a]}, {"params": [b], "lr": torch.tensor([0.25])}]
    with pytest.raises(ValueError, match=r"lr=tensor\(\[0\.25.*is a tensor, which a schedule cannot drive"):
        fusedlr.FusedAdamW(groups, lr=PEAK, schedule=SCHEDULE)
    optimizer = fusedlr.FusedAdamW([a], lr=torch.tensor(PEAK))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="is a tensor, which a schedule cannot drive"):
        optimizer.add_param_group({"params": [b], "schedule": SCHEDULE})
    assert not changes(before, snapshot(optimizer))


@pytest.mark.parametrize("shape", [(2,), (0,), (1, 3)])
def test_a_tensor_rate_of_several_elements_is_refused(shape):
    with pytest.raises(ValueError, match=r"lr has shape .*, a tensor lr must have one element"):
        fusedlr.FusedAdamW(make_params(), lr=torch.ones(shape))


# --- checkpoint tools


def test_the_step_that_allocates_state_is_none_of_the_run():
    """torch.distributed.checkpoint makes a step with lr 0 and zero gradients on a fresh optimizer."""
    model = nn.Linear(3, 2)
    optimizer = fusedlr.FusedAdamW(
        model.parameters(), lr=PEAK, weight_decay=0.5, schedule=fusedlr.cosine(total_steps=9)
    )
    before = bits(dict(model.state_dict()))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp.get_optimizer_state_dict(model, optimizer)
        assert bits(dict(model.state_dict())) == before
        assert optimizer.metrics()["step"].tolist() == [0]
        # t counts as in torch
        assert {int(entry["step"]) for entry in optimizer.state.values()} == {1}
        set_grads(optimizer, 0)
        optimizer.step()
    assert not disagreements(caught)
    assert optimizer.metrics()["step"].tolist() == [1]
    assert optimizer.metrics()["lr"].tolist() == [PEAK]


def test_an_allocating_step_moves_no_weight_under_a_tensor_rate():
    model = nn.Linear(3, 2)
    optimizer = fusedlr.FusedAdamW(model.parameters(), lr=torch.tensor(PEAK), weight_decay=0.5)
    before = bits(dict(model.state_dict()))
    dcp.get_optimizer_state_dict(model, optimizer)
    assert bits(dict(model.state_dict())) == before
    assert optimizer.param_groups[0]["lr"] == torch.tensor(PEAK)


def test_a_foreign_rate_of_zero_later_in_the_run_is_a_step():
    optimizer = make()
    step(optimizer, 0)
    optimizer.param_groups[0]["lr"] = 0.0
    with quiet():
        step(optimizer, 1)
    assert optimizer.metrics()["step"].tolist() == [2]


def test_the_schedules_own_first_rate_of_zero_is_a_step():
    optimizer = make()
    assert optimizer.param_groups[0]["lr"] == 0.0
    step(optimizer, 0)
    assert optimizer.metrics()["step"].tolist() == [1]


# --- the view


def test_the_view_is_a_scheduler_to_those_who_ask():
    optimizer = make()
    view = optimizer.scheduler
    assert isinstance(view, lr_scheduler.LRScheduler)
    assert view.optimizer is optimizer
    assert optimizer.scheduler is view
    # accelerate would take a scheduler with this for OneCycleLR
    assert not hasattr(view, "total_steps")
    # LRScheduler's constructor wraps the step
    assert "step" not in vars(optimizer)
    assert view.base_lrs == [PEAK]
    assert view.get_lr() == view.get_last_lr() == view._last_lr == [0.0]
    assert all(type(rate) is float for rate in view.get_last_lr())


def test_the_view_counts_nothing():
    optimizer = make()
    for k in range(5):
        step(optimizer, k)
        before = snapshot(optimizer, lr=False)
        # once per process, as accelerate does, with whatever arguments
        for _ in range(4):
            optimizer.scheduler.step()
        optimizer.scheduler.step(17)
        optimizer.scheduler.step(epoch=3)
        assert not changes(before, snapshot(optimizer, lr=False))
        assert optimizer.scheduler.last_epoch == k + 1
    assert_same_weights(optimizer, with_rates([SCHEDULE.lr_at(k, PEAK) for k in range(5)]))


def test_the_view_may_be_stepped_before_the_optimizer():
    optimizer = make()
    for k in range(5):
        optimizer.scheduler.step()
        step(optimizer, k)
    assert_same_weights(optimizer, with_rates([SCHEDULE.lr_at(k, PEAK) for k in range(5)]))


def test_what_accelerate_counts_in_the_view_has_no_effect():
    optimizer = make()
    step(optimizer, 0)
    optimizer.scheduler._step_count += 1
    assert optimizer.scheduler._step_count == 1
    optimizer.scheduler.step()
    assert (optimizer.scheduler._step_count, optimizer.scheduler.last_epoch) == (2, 1)


def test_the_view_of_an_optimizer_without_a_schedule_leaves_the_rate_alone():
    optimizer = make(None)
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.scheduler.step()
    assert optimizer.scheduler.get_last_lr() == [0.3]
    step(optimizer, 0)
    optimizer.scheduler.step()
    assert optimizer.scheduler.last_epoch == 1
    assert_same_weights(optimizer, with_rates([0.3]))


def lambda_states(steps: int) -> tuple[dict, dict]:
    """State of the view and of a real LambdaLR after as many steps."""
    ours, stock = make(), make_stock()
    # a plain function is saved as None
    foreign = lr_scheduler.LambdaLR(stock, lambda k: SCHEDULE.lr_at(k))
    for k in range(steps):
        step(ours, k)
        ours.scheduler.step()
        step(stock, k)
        foreign.step()
    return ours.scheduler.state_dict(), foreign.state_dict()


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_the_views_state_is_lambda_lrs_in_plain_numbers(steps):
    ours, theirs = lambda_states(steps)
    assert (ours.pop("k"), ours.pop("k_at_epoch")) == ([steps], steps)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert type(ours[key]) is type(value), key
        assert ours[key] == (pytest.approx(value, rel=1e-15) if key == "_last_lr" else value), key


def plain(x: Any) -> bool:
    if isinstance(x, dict):
        return all(type(key) is str and plain(value) for key, value in x.items())
    if isinstance(x, list):
        return all(map(plain, x))
    return x is None or type(x) in (int, float, bool, str)


def test_the_views_state_loads_with_weights_only(tmp_path):
    optimizer = make()
    step(optimizer, 0)
    state = optimizer.scheduler.state_dict()
    assert plain(state)
    torch.save(state, tmp_path / "scheduler.pt")
    assert torch.load(tmp_path / "scheduler.pt", weights_only=True) == state


def test_the_views_state_loads_into_lambda_lr():
    ours, _ = lambda_states(5)
    foreign = lr_scheduler.LambdaLR(make_stock(), lambda k: SCHEDULE.lr_at(k))
    foreign.load_state_dict(ours)
    assert foreign.last_epoch == 5
    foreign.step()
    assert foreign.get_last_lr() == [SCHEDULE.lr_at(6, PEAK)]


@pytest.mark.parametrize("scheduler_first", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_a_schedulers_state_overrides_the_optimizers_in_either_order(theirs, scheduler_first):
    source = make()
    for k in range(3):
        step(source, k)
    view_state = lambda_states(7)[1 if theirs else 0]
    optimizer = make()
    loads = [
        lambda: optimizer.load_state_dict(source.state_dict()),
        lambda: optimizer.scheduler.load_state_dict(view_state),
    ]
    for load in reversed(loads) if scheduler_first else loads:
        load()
    assert optimizer.scheduler.last_epoch == 7
    assert optimizer.param_groups[0]["lr"] == SCHEDULE.lr_at(7, PEAK)
    step(optimizer, 7)
    assert optimizer.metrics()["lr"].item() == pytest.approx(SCHEDULE.lr_at(7, PEAK), rel=1e-15)
    assert optimizer.metrics()["step"].tolist() == [8]
    # a checkpoint loaded later in the run counts again
    with quiet():
        optimizer.load_state_dict(source.state_dict())
    assert optimizer.scheduler.last_epoch == 3


def test_loading_a_schedulers_state_keeps_the_callers_dict():
    state = lambda_states(2)[0]
    before = copy.deepcopy(state)
    make().scheduler.load_state_dict(state)
    assert state == before


def test_groups_that_differ_in_their_count_keep_it_through_the_views_state():
    optimizer = make()
    step(optimizer, 0)
    step(optimizer, 1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))]})
    step(optimizer, 2)
    state = optimizer.scheduler.state_dict()
    assert state["k"] == [3, 1]
    twin = make()
    twin.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))]})
    twin.scheduler.load_state_dict(state)
    assert twin.metrics()["step"].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "last_epoch=None in the scheduler's state is not an integer"),
        ({"last_epoch": 2.5}, "last_epoch=2.5 in the scheduler's state is not an integer"),
        ({"last_epoch": "3"}, "last_epoch='3' in the scheduler's state is not an integer"),
        ({"last_epoch": -1}, "last_epoch=-1 in the scheduler's state is negative"),
        ({"last_epoch": 4, "k": [-3], "k_at_epoch": 4}, "-3 in the scheduler's state is negative"),
    ],
)
def test_a_schedulers_state_without_a_step_is_refused(state, message):
    optimizer = make()
    step(optimizer, 0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.scheduler.load_state_dict(state)
    assert not changes(before, snapshot(optimizer))


def test_the_view_survives_pickle_and_deepcopy_with_its_optimizer():
    optimizer = make()
    step(optimizer, 0)
    for twin in (
        copy.deepcopy((optimizer, optimizer.scheduler)),
        pickle.loads(pickle.dumps((optimizer, optimizer.scheduler))),
    ):
        other, view = twin
        assert view.optimizer is other is not optimizer
        step(other, 1)
        view.step()
        assert view.last_epoch == 2
        assert optimizer.scheduler.last_epoch == 0


# --- memory


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("use", ["fresh", "stepped", "viewed", "loaded", "foreign", "refused"])
def test_a_dropped_optimizer_is_freed_at_once(use):
    optimizer = make()
    params = params_of(optimizer)
    if use != "fresh":
        step(optimizer, 0)
    if use == "viewed":
        optimizer.scheduler.step()
        optimizer.last_metrics()
        repr(optimizer)
    if use == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.scheduler.load_state_dict(optimizer.scheduler.state_dict())
    if use == "foreign":
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)
        with quiet():
            step(optimizer, 1)
        scheduler.step()
        del scheduler
    if use == "refused":
        with pytest.raises(ValueError, match="groups"):
            optimizer.load_state_dict({"state": {}, "param_groups": []})
    moments = [weakref.ref(entry["exp_avg"]) for entry in optimizer.state.values()]
    alive = weakref.ref(optimizer)
    del optimizer
    assert alive() is None
    assert all(ref() is None for ref in moments)
    assert params


@pytest.mark.usefixtures("no_collector")
def test_a_view_keeps_its_optimizer():
    view = make().scheduler
    assert view.optimizer.param_groups[0]["initial_lr"] == PEAK
    alive = weakref.ref(view.optimizer)
    del view
    assert alive() is None


# --- accelerate and the Trainer


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def test_accelerate_prepare_keeps_the_schedule(accelerator):
    """It replaces the groups by copies and loads the state back before the first step."""
    accelerator = accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    twin = copy.deepcopy(model)
    ours = fusedlr.FusedAdamW(model.parameters(), lr=PEAK, schedule=SCHEDULE)
    stock = torch.optim.AdamW(twin.parameters(), lr=PEAK)
    foreign = lr_scheduler.LambdaLR(stock, SCHEDULE.lr_at)
    data = torch.randn(16, 3, dtype=torch.float64)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", fusedlr.FallbackWarning)
        model, optimizer, scheduler = accelerator.prepare(model, ours, ours.scheduler)
        for x in data:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().sum())
                optimizer.step()
                rates.append(scheduler.get_last_lr()[0])
                scheduler.step()
                optimizer.zero_grad()
    for a, b in data.view(8, 2, 3):
        ((twin(a).square().sum() + twin(b).square().sum()) / 2).backward()
        stock.step()
        foreign.step()
        stock.zero_grad()
    assert ours.metrics()["step"].tolist() == [8]
    assert rates[1::2] == [SCHEDULE.lr_at(k, PEAK) for k in range(8)]
    assert_same_weights(ours, stock)


def test_accelerate_saves_and_loads(accelerator, tmp_path):
    accelerator = accelerator(cpu=True)
    model = nn.Linear(3, 1)
    optimizer = fusedlr.FusedAdamW(model.parameters(), lr=PEAK, schedule=SCHEDULE)
    wrapped = accelerator.prepare(model, optimizer, optimizer.scheduler)
    for k in range(3):
        set_grads(optimizer, k)
        wrapped[1].step()
        wrapped[2].step()
    accelerator.save_state(str(tmp_path))
    saved = snapshot(optimizer)
    for k in range(3):
        set_grads(optimizer, 9 + k)
        wrapped[1].step()
        wrapped[2].step()
    accelerator.load_state(str(tmp_path))
    assert set(changes(saved, snapshot(optimizer))) <= {"grads"}


def tiny_llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def train(
    folder: Any, make_optimizers: Callable[[Any], tuple], resume: str | None = None
) -> tuple[Any, Any, list[float]]:
    """Six updates of the Trainer with a checkpoint at the third: model, optimizer, logged rates."""
    import transformers

    model = tiny_llama()
    optimizers = make_optimizers(model)
    tokens = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        max_grad_norm=1.0,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, optimizers=optimizers)
    trainer.train(resume_from_checkpoint=resume)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    return model, optimizers[0], rates


def ours_for(schedule: fusedlr.Schedule | None) -> Callable[[Any], tuple]:
    def make_optimizers(model: Any) -> tuple:
        optimizer = fusedlr.FusedAdamW(model.parameters(), lr=PEAK, schedule=schedule)
        return optimizer, optimizer.scheduler if schedule else None

    return make_optimizers


def test_the_trainer_trains_logs_and_resumes_as_with_stock(tmp_path, capsys):
    pytest.importorskip("transformers")
    schedule = fusedlr.cosine(warmup_steps=2, total_steps=6)

    def stock(model: Any) -> tuple:
        optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK)
        return optimizer, lr_scheduler.LambdaLR(optimizer, schedule.lr_at)

    theirs, _, their_rates = train(tmp_path / "stock", stock)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, optimizer, rates = train(tmp_path / "ours", ours_for(schedule))
        resumed, again, later_rates = train(
            tmp_path / "again", ours_for(schedule), str(tmp_path / "ours" / "checkpoint-3")
        )
    assert not disagreements(caught)
    assert rates == pytest.approx(their_rates, rel=1e-12)
    assert rates == pytest.approx([schedule.lr_at(k, PEAK) for k in range(6)], rel=1e-12)
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        # fp32, and the Trainer clips by itself
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert later_rates == rates
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert bits(p) == bits(q)
    assert set(changes(snapshot(optimizer), snapshot(again))) <= {"grads", "groups"}
    assert again.scheduler.last_epoch == 6


def test_the_trainers_own_scheduler_is_obeyed(tmp_path, capsys):
    """`optimizers=(optimizer, None)`: the Trainer builds a linear schedule and drives ours with it."""
    pytest.importorskip("transformers")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, optimizer, rates = train(tmp_path, ours_for(None))
    assert not disagreements(caught)
    assert rates == pytest.approx([PEAK * (6 - k) / 6 for k in range(6)])
    assert optimizer.metrics()["lr"].item() == pytest.approx(PEAK / 6)
    assert math.isclose(optimizer.param_groups[0]["initial_lr"], PEAK)
