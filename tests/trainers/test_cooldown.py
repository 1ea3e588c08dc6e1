"""`fusedlr.hf.Cooldown`: a Trainer's run cools down at a step or by an hour, and stops when it has."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("fusedlr.hf")
from kit import recorded  # noqa: E402
from small_runs import LR, logged, make  # noqa: E402

import fusedlr  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick")

# of a run that is longer than any here
MANY = 1000
BASE = fusedlr.cosine(warmup_steps=2, total_steps=MANY)


class Clock(transformers.TrainerCallback):
    """Seconds that pass with every update, and with every evaluation."""

    def __init__(self, pace: Callable[[int], float] = lambda k: 1.0) -> None:
        self.now, self.pace = 1e9, pace

    def __call__(self) -> float:
        return self.now

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now += self.pace(state.global_step)


def run(folder: Any, cooldown: Any, *others: Any, resume: Any = None, **options: Any) -> Any:
    callbacks = {"callbacks": [*others, cooldown]}
    trainer = make(hf.FusedLRTrainer, folder, callbacks, **{"max_steps": MANY, **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def want(begin: int, steps: int) -> list[float]:
    """The rates of a run that cools down for so many updates from this one on, by the formula."""
    r = BASE.lr_at(begin, LR)
    return [BASE.lr_at(k, LR) for k in range(begin)] + [r * (1 - math.sqrt(i / steps)) for i in range(steps)]


def test_it_cools_down_from_a_step_on_and_stops(tmp_path):
    with recorded() as caught:
        trainer = run(tmp_path, hf.Cooldown(10, at_step=15))
    assert trainer.state.global_step == 25 and not caught
    assert logged(trainer, "learning_rate") == pytest.approx(want(15, 10), rel=1e-12)
    assert repr(hf.unwrap(trainer.optimizer)).endswith("cooldown(k=15, steps=10) of peak 0.01")


def test_it_evaluates_and_saves_at_the_end_as_after_the_last_of_max_steps(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 100, "save_strategy": "steps", "save_steps": 100}
    trainer = make(
        hf.FusedLRTrainer,
        tmp_path,
        {
            "callbacks": [hf.Cooldown(4, at_step=3)],
            "eval_dataset": [dict(x=torch.ones(4), labels=torch.ones(1))],
        },
        max_steps=MANY,
        **options,
    )
    trainer.train()
    assert trainer.state.global_step == 7 and (tmp_path / "checkpoint-7").exists()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [7]


@pytest.mark.parametrize("saved_at", (5, 10), ids=("before", "in the cooldown"))
def test_a_resumed_run_goes_on_with_it(tmp_path, saved_at):
    whole = run(tmp_path / "whole", hf.Cooldown(8, at_step=7))
    run(tmp_path, hf.Cooldown(8, at_step=7), save_strategy="steps", save_steps=5)
    with recorded() as caught:
        resumed = run(
            tmp_path,
            hf.Cooldown(8, at_step=7),
            resume=str(tmp_path / f"checkpoint-{saved_at}"),
            logging_steps=1,
        )
    assert not caught
    assert resumed.state.global_step == 15
    rates = [logged(trainer, "learning_rate") for trainer in (resumed, whole)]
    assert rates[0] == rates[1] == pytest.approx(want(7, 8), rel=1e-12)


def test_a_second_training_begins_the_schedule_anew(tmp_path):
    trainer = run(tmp_path, hf.Cooldown(4, at_step=5))
    first = logged(trainer, "learning_rate")
    trainer.train()
    assert logged(trainer, "learning_rate") == first and trainer.state.global_step == 9


def test_skipped_updates_do_not_count(tmp_path):
    class Spoil(transformers.TrainerCallback):
        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any
        ) -> None:
            if state.global_step in (3, 8, 9):
                model.linear.weight.grad.fill_(torch.inf)

    trainer = run(tmp_path, hf.Cooldown(5, at_step=6), Spoil())
    # one was skipped before the cooldown and two in it
    assert trainer.state.global_step == 13
    assert hf.unwrap(trainer.optimizer).metrics()["step"].tolist() == [10, 10]
    assert hf.unwrap(trainer.optimizer).param_groups[0]["schedule"] == BASE.cooldown(5, 5)


@pytest.mark.parametrize("steps", (1, 10, 25))
def test_it_ends_by_the_time_that_is_given_in_seconds(tmp_path, steps):
    clock = Clock()
    trainer = run(tmp_path, hf.Cooldown(steps, finish_by=60.0, clock=clock), clock)
    assert trainer.state.global_step == 60
    assert logged(trainer, "learning_rate") == pytest.approx(want(60 - steps, steps), rel=1e-12)


def test_it_ends_by_an_hour(tmp_path):
    clock = Clock()
    hour = datetime.fromtimestamp(clock.now + 40, timezone.utc)
    trainer = run(tmp_path, hf.Cooldown(10, finish_by=hour, clock=clock), clock)
    assert trainer.state.global_step == 40
    # without a zone it is local
    clock = Clock()
    local = datetime.fromtimestamp(clock.now + 30)
    assert run(tmp_path, hf.Cooldown(10, finish_by=local, clock=clock), clock).state.global_step == 30


@pytest.mark.parametrize(
    "pace",
    [
        lambda k: 1.0 + 0.3 * math.sin(k),
        # an evaluation every 20 updates
        lambda k: 15.0 if k % 20 == 7 else 1.0,
        # the first update compiles
        lambda k: 100.0 if k == 0 else 1.0,
        # slower from some update on, in the cooldown too
        lambda k: 1.0 if k < 280 else 2.0,
        # faster
        lambda k: 2.0 if k < 100 else 1.0,
    ],
    ids=("uneven", "evaluations", "first", "slower", "faster"),
)
def test_updates_that_take_different_times_end_in_time_and_at_the_end_of_the_cooldown(tmp_path, pace):
    clock, begin = Clock(pace), Clock().now
    cooldown = hf.Cooldown(50, finish_by=350.0, clock=clock)
    trainer = run(tmp_path, cooldown, clock, logging_steps=1)
    fused, last = hf.unwrap(trainer.optimizer), trainer.state.global_step
    # not later than one of the longest pauses, nor much earlier
    assert 350 - 50 <= clock.now - begin <= 350 + 3
    assert fused.param_groups[0]["schedule"].lr_at(last, LR) == 0.0
    assert fused.param_groups[0]["schedule"].lr_at(last - 1, LR) > 0.0


def test_too_little_time_shortens_it_and_says_so(tmp_path):
    clock = Clock()
    with pytest.warns(
        UserWarning, match="the cooldown is of 8 updates instead of steps=50: no more fit before"
    ):
        trainer = run(tmp_path, hf.Cooldown(50, finish_by=10.0, clock=clock), clock)
    assert trainer.state.global_step == 10
    assert hf.unwrap(trainer.optimizer).param_groups[0]["schedule"] == BASE.cooldown(2, 8)


def test_the_end_of_the_run_comes_first(tmp_path):
    clock = Clock()
    trainer = run(tmp_path, hf.Cooldown(5, finish_by=1000.0, clock=clock), clock, max_steps=20)
    # the schedule of the arguments has ended
    assert trainer.state.global_step == 20
    assert not hf.unwrap(trainer.optimizer).param_groups[0]["schedule"].changes
    message = "from at_step=18 on has steps=5, and training will end before it does, after 20 updates"
    with pytest.warns(UserWarning, match=message):
        run(tmp_path, hf.Cooldown(5, at_step=18), max_steps=20)


def test_what_somebody_cancels_is_not_begun_again(tmp_path):
    class Cancel(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kw: Any) -> None:
            if state.global_step == 8:
                hf.unwrap(optimizer).cancel_cooldown()

    trainer = run(tmp_path, hf.Cooldown(5, at_step=6), Cancel(), max_steps=20)
    assert trainer.state.global_step == 20
    assert not hf.unwrap(trainer.optimizer).param_groups[0]["schedule"].changes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Cooldown needs one of at_step and finish_by, got at_step=None and finish_by=None"),
        ({"at_step": 3, "finish_by": 3}, "got at_step=3 and finish_by=3"),
        ({"at_step": 0}, "at_step=0 must be at least 1"),
        ({"finish_by": 0}, "finish_by=0 must be above 0"),
        ({"finish_by": "noon"}, "finish_by='noon' is not a number"),
        ({"at_step": 3, "steps": 0}, "steps=0 must be at least 1"),
        ({"at_step": 3, "shape": "wave"}, "shape='wave' is unknown"),
        ({"at_step": 3, "to": 2}, r"to=2 must be a ratio in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        hf.Cooldown(**{"steps": 5, **options})


def test_what_it_cannot_do_is_said_when_training_begins(tmp_path):
    with pytest.raises(ValueError, match="this Trainer's optimizer is AdamW: use FusedLRTrainer"):
        make(transformers.Trainer, tmp_path, {"callbacks": [hf.Cooldown(5, at_step=3)]}).train()
    optimizer = {"optimizer_cls_and_kwargs": (fusedlr.FusedAdamW, {"lr": LR})}
    with pytest.raises(ValueError, match="optimizer is FusedAdamW without a schedule"):
        make(transformers.Trainer, tmp_path, {"callbacks": [hf.Cooldown(5, at_step=3)], **optimizer}).train()
    past = datetime.fromtimestamp(0, timezone.utc)
    with pytest.raises(ValueError, match=r"finish_by=1970-01-01 00:00:00\+00:00 has passed"):
        run(tmp_path, hf.Cooldown(5, finish_by=past))
