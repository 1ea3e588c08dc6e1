"""Checkpoints of the Hugging Face Trainer, and what the callback logs and says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_runs import hf, make, needs_hook, run, spoil, transformers
from tolerances import STOCK_DISTANCE_RATIO
from trainer_kit import (
    FOREACH,
    FUSED,
    LR,
    OURS,
    STEPS,
    WARMUP,
    Outcome,
    assert_rates,
    distance,
    logged,
    lora_model,
    trainable,
)

import fusedlr


@pytest.mark.parametrize("ours", [hf.FusedLRTrainer, transformers.Trainer])
def test_a_resumed_run_is_the_run(tmp_path, ours):
    def train(folder: Path, resume: Any = None) -> Outcome:
        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
        if ours is transformers.Trainer:
            model = lora_model()
            schedule = fusedlr.cosine(warmup_steps=WARMUP, total_steps=STEPS)
            optimizer = fusedlr.FusedAdamW(trainable(model), lr=LR, schedule=schedule)
            given = {"optimizers": (optimizer, optimizer.scheduler)}
            options |= {"model": model, "cls": ours, "trainer": given}
        return run(folder, OURS, resume=resume, **options)

    whole = train(tmp_path / "whole")
    resumed = train(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-5"))
    assert torch.equal(whole.weights, resumed.weights)
    assert whole.rates == resumed.rates
    assert whole.losses == resumed.losses
    assert whole.norms == resumed.norms


def test_checkpoints_are_plain_tensors_and_numbers(tmp_path):
    for kind in (OURS, FUSED):
        run(tmp_path / kind, kind, save_strategy="steps", save_steps=5)
    ours, stock = ({f.name for f in (tmp_path / kind / "checkpoint-5").iterdir()} for kind in (OURS, FUSED))
    assert ours == stock
    for name in ("optimizer.pt", "scheduler.pt"):
        mine, theirs = (
            torch.load(tmp_path / kind / "checkpoint-5" / name, weights_only=True) for kind in (OURS, FUSED)
        )
        assert mine.keys() >= theirs.keys()
        if name == "optimizer.pt":
            assert mine["state"].keys() == theirs["state"].keys()
            for a, b in zip(mine["param_groups"], theirs["param_groups"], strict=True):
                # torch's scheduler has put the peak among the items
                assert a.keys() == b.keys() - {"initial_lr"}
            assert mine["fusedlr"]["groups"][0]["k"] == 5


def test_more_epochs_than_the_checkpoint_had_are_reported_and_used(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6}
    run(tmp_path / "a", OURS, **options)
    checkpoint = str(tmp_path / "a" / "checkpoint-6")
    with pytest.warns(UserWarning, match="the checkpoint's run has 20 updates, this one 30"):
        longer = run(tmp_path / "b", OURS, resume=checkpoint, max_steps=30)
    # nothing to say where nothing changes
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the loaded schedule")
        run(tmp_path / "c", OURS, resume=checkpoint)
    schedule = fusedlr.cosine(warmup_steps=WARMUP, total_steps=30)
    assert_rates(longer.rates[6:], [schedule.lr_at(k, LR) for k in range(6, 30)])


@needs_hook
def test_skipped_steps_are_logged_once_there_are_any(tmp_path):
    seen: list[Any] = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                seen.append(logs.get("skipped_steps"))

    trainer = make(tmp_path, OURS, max_steps=8, trainer={"callbacks": [Reporter()]})
    spoil(trainer, {3, 5})
    with pytest.warns(UserWarning, match="training ended after 6 updates, but the schedule is"):
        trainer.train()
    skips = [entry.get("skipped_steps") for entry in trainer.state.log_history if "loss" in entry]
    assert skips == seen == [None] * 3 + [1, 1, 2, 2, 2]
    assert hf.unwrap(trainer.optimizer).scheduler.last_epoch == 6
    # the schedule waits for the updates that were skipped
    schedule = fusedlr.cosine(warmup_steps=WARMUP, total_steps=8)
    assert_rates(logged(trainer).rates, [schedule.lr_at(k, LR) for k in (0, 1, 2, 3, 3, 4, 4, 5)])


def with_schedule(folder: Path, total: int, stop: int | None = None) -> Any:
    """A plain Trainer of 12 updates whose optimizer has a schedule of its own."""

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == stop

    model = lora_model()
    optimizer = fusedlr.FusedAdamW(trainable(model), lr=LR, schedule=fusedlr.linear(total_steps=total))
    settings = {"optimizers": (optimizer, optimizer.scheduler), "callbacks": [hf.FusedLRCallback(), Stop()]}
    return make(folder, OURS, model, cls=transformers.Trainer, trainer=settings, max_steps=12)


def test_a_schedule_of_another_length_than_the_run_is_said_once(tmp_path):
    with pytest.warns(UserWarning) as caught:
        with_schedule(tmp_path, total=96).train()
    said = [str(w.message) for w in caught if "the schedule is" in str(w.message)]
    assert said == [
        "training will end after 12 updates, but the schedule is linear(total_steps=96): the last rate is "
        "88.5% of the peak where the schedule's last is 1.0%. total_steps counts updates that are made, not "
        "batches"
    ]


@pytest.mark.parametrize(("total", "stop"), [(12, None), (12, 4)])
def test_a_schedule_that_fits_and_a_run_stopped_on_purpose_say_nothing(tmp_path, total, stop):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the schedule is")
        with_schedule(tmp_path, total, stop).train()


@pytest.mark.parametrize(("before", "after"), [(FUSED, OURS), (OURS, FUSED)])
def test_a_trainers_run_moves_over_and_back(tmp_path, before, after):
    options = {"save_strategy": "steps", "save_steps": 8}
    stay, foreach = run(tmp_path, FUSED), run(tmp_path, FOREACH)
    run(tmp_path / "moving", before, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*schedule")
        moved: Outcome = run(tmp_path, after, resume=str(tmp_path / "moving" / "checkpoint-8"))
    assert_rates(moved.rates, stay.rates)
    assert moved.norms == pytest.approx(stay.norms, rel=1e-3)
    assert distance(moved, stay) <= STOCK_DISTANCE_RATIO * distance(stay, foreach)
