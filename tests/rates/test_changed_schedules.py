"""A schedule that changes in mid-run: by a checkpoint of another one, made longer on purpose, begun late."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import recorded, silent
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from trainer_kit import assert_rates

import fusedlr

PEAK, TOTAL = 1e-2, 30
SCHEDULE = fusedlr.cosine(warmup_steps=5, total_steps=TOTAL)


class Loop:
    """A loop in fp64 with stock or with fusedlr, saved and loaded by torch.save."""

    def __init__(self, ours: bool, schedule: fusedlr.Schedule = SCHEDULE) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.params = [nn.Parameter(draw(4, 3)), nn.Parameter(draw(5))]
        if ours:
            self.optimizer: Any = fusedlr.FusedAdamW(self.params, lr=PEAK, schedule=schedule)
            self.scheduler: Any = self.optimizer.scheduler
        else:
            self.optimizer = torch.optim.AdamW(self.params, lr=PEAK)
            self.scheduler = LambdaLR(self.optimizer, schedule.lr_at)

    def train(self, begin: int, end: int) -> list[float]:
        rates = []
        for k in range(begin, end):
            generator = torch.Generator().manual_seed(k)
            for p in self.params:
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            self.optimizer.step()
            rates += self.scheduler.get_last_lr()
            self.scheduler.step()
        return rates

    def save(self, path: Path) -> None:
        parts = [self.params, self.optimizer.state_dict(), self.scheduler.state_dict()]
        torch.save(parts, path)

    def load(self, path: Path) -> None:
        params, optimizer, scheduler = torch.load(path, weights_only=True)
        with torch.no_grad():
            for p, saved in zip(self.params, params, strict=True):
                p.copy_(saved)
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(scheduler)


def moved(tmp_path: Path, here: fusedlr.Schedule, ours: bool = False) -> list[str]:
    """What is said when a run of `SCHEDULE` goes on under `here`."""
    before = Loop(ours)
    before.train(0, 10)
    before.save(tmp_path / "checkpoint.pt")
    after = Loop(True, here)
    with recorded() as caught:
        after.load(tmp_path / "checkpoint.pt")
    # what is asked for is what is done
    assert_rates(after.train(10, 12), [here.lr_at(k, PEAK) for k in (10, 11)])
    return [str(warning.message) for warning in caught]


def test_a_stock_schedule_that_disagrees_is_reported_in_words(tmp_path):
    said = moved(tmp_path, fusedlr.cosine(warmup_steps=5, total_steps=60))
    assert said == [
        "the loaded schedule is not the one asked for: group 0: at k = 10 the checkpoint's scheduler gives "
        "0.9045 of the peak, this optimizer's schedule 0.9797; this optimizer's is used"
    ]
    # one update more is seen as well
    assert len(moved(tmp_path, fusedlr.cosine(warmup_steps=5, total_steps=TOTAL + 1))) == 1


def test_a_stock_schedule_that_agrees_is_not_mentioned(tmp_path):
    assert moved(tmp_path, SCHEDULE) == []


def test_the_state_of_any_torch_scheduler_is_compared_by_its_rate():
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=PEAK)
    other = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with pytest.warns(UserWarning, match="at k = 0 the checkpoint's scheduler gives 1 of the peak"):
        Loop(True).scheduler.load_state_dict(other.state_dict())


def test_our_own_schedule_that_disagrees_is_reported_once(tmp_path):
    said = moved(tmp_path, fusedlr.cosine(warmup_steps=5, total_steps=60), ours=True)
    assert said == [
        "the loaded schedule is not the one asked for: group 0: the checkpoint's run has 30 updates, "
        "this one 60; this optimizer's schedule is used"
    ]


def test_an_extended_schedule_continues_as_if_it_had_always_been_longer(tmp_path):
    loop = Loop(ours=True)
    loop.train(0, 10)
    longer = fusedlr.cosine(warmup_steps=5, total_steps=60)
    loop.optimizer.extend_schedule(total_steps=60)
    assert loop.optimizer.param_groups[0]["schedule"] == longer
    # the rate of the coming update is on show
    assert loop.optimizer.param_groups[0]["lr"] == longer.lr_at(10, PEAK)
    assert_rates(loop.train(10, 60), [longer.lr_at(k, PEAK) for k in range(10, 60)])
    # in a checkpoint and a copy too
    loop.save(tmp_path / "checkpoint.pt")
    with silent():
        Loop(True, longer).load(tmp_path / "checkpoint.pt")
    copy = pickle.loads(pickle.dumps(loop.optimizer))
    assert copy.param_groups[0]["schedule"] == longer
    copy.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert copy.param_groups[1]["schedule"] == longer


def test_extending_leaves_the_rate_just_used_on_show():
    p = nn.Parameter(torch.ones(2))
    optimizer = fusedlr.FusedAdamW([p], lr=PEAK, schedule=fusedlr.linear(total_steps=10))
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.step()
    optimizer.extend_schedule(total_steps=20)
    assert optimizer.scheduler.get_last_lr() == [pytest.approx(0.9 * PEAK)]
    optimizer.step()
    assert optimizer.scheduler.get_last_lr() == [pytest.approx(0.9 * PEAK)]


def test_extending_leaves_a_rate_that_was_assigned_for_the_coming_update():
    p = nn.Parameter(torch.ones(2))
    optimizer = fusedlr.FusedAdamW([p], lr=PEAK, schedule=fusedlr.linear(total_steps=10))
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.extend_schedule(total_steps=20)
    assert optimizer.scheduler.get_last_lr() == [0.3]


def test_groups_are_extended_each_by_its_own_rule():
    params = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups: list[dict[str, Any]] = [
        {"params": [params[0]], "schedule": fusedlr.polynomial(total_steps=10, lr_end=1e-4)},
        {"params": [params[1]]},
        {"params": [params[2]], "schedule": fusedlr.constant()},
    ]
    optimizer = fusedlr.FusedAdamW(groups, lr=PEAK)
    optimizer.extend_schedule(total_steps=20)
    first, second, third = optimizer.param_groups
    # an absolute level stays where it was
    assert first["schedule"] == fusedlr.polynomial(total_steps=20, lr_end=1e-4).resolve(PEAK)
    assert second.get("schedule") is None
    assert third["schedule"] == fusedlr.constant()


@pytest.mark.parametrize(
    ("schedule", "total", "message"),
    [
        (fusedlr.linear(total_steps=10), 9, "total_steps=9 is less than the schedule's 10"),
        (fusedlr.table([1.0, 0.5]), 9, r"no rule by which table\(\[1.0, 0.5\]\) gets total_steps=9"),
        (None, 9, "no group has a schedule"),
        (fusedlr.linear(total_steps=10), 10.5, "total_steps=10.5"),
    ],
)
def test_what_cannot_be_extended_is_refused_and_left_alone(schedule, total, message):
    optimizer = fusedlr.FusedAdamW([nn.Parameter(torch.zeros(1))], lr=PEAK, schedule=schedule)
    with pytest.raises(ValueError, match=message):
        optimizer.extend_schedule(total_steps=total)
    assert optimizer.param_groups[0].get("schedule") is schedule


def test_a_schedule_begun_late_is_one_given_at_the_start():
    early, late = Loop(ours=True), Loop(ours=True)
    late.optimizer = fusedlr.FusedAdamW(late.params, lr=PEAK)
    late.scheduler = late.optimizer.scheduler
    late.optimizer.start_schedule(SCHEDULE)
    assert late.train(0, TOTAL) == early.train(0, TOTAL)
    for p, q in zip(late.params, early.params, strict=True):
        assert torch.equal(p, q)


def test_a_schedule_begun_anew_leaves_moments_and_their_counts():
    loop = Loop(ours=True)
    loop.train(0, 7)
    moments = [state["exp_avg"].clone() for state in loop.optimizer.state.values()]
    loop.optimizer.start_schedule(fusedlr.linear(total_steps=10))
    assert all(
        torch.equal(m, s["exp_avg"]) for m, s in zip(moments, loop.optimizer.state.values(), strict=True)
    )
    assert_rates(loop.train(7, 10), [PEAK * (10 - k) / 10 for k in range(3)])
    assert {int(state["step"]) for state in loop.optimizer.state.values()} == {10}
    # and a checkpoint knows both counts
    again = Loop(True, fusedlr.linear(total_steps=10))
    again.optimizer.load_state_dict(loop.optimizer.state_dict())
    assert again.scheduler.last_epoch == 3


@pytest.mark.parametrize(
    ("schedule", "lr", "error", "message"),
    [
        (None, PEAK, TypeError, "is not a fusedlr.Schedule"),
        (SCHEDULE, torch.tensor(PEAK), ValueError, "is a tensor, which a schedule cannot drive"),
        (fusedlr.linear(total_steps=10, min_lr=1.0), PEAK, ValueError, "min_lr=1.0 is above the peak"),
    ],
)
def test_what_cannot_be_begun_is_refused(schedule, lr, error, message):
    optimizer = fusedlr.FusedAdamW([nn.Parameter(torch.zeros(1))], lr=lr)
    with pytest.raises(error, match=message):
        optimizer.start_schedule(schedule)
    assert "schedule" not in optimizer.param_groups[0] or optimizer.param_groups[0]["schedule"] is None
