"""Who clips in the Hugging Face Trainer, and what loss scaling makes of its schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_runs import hf, make, needs_hook, run, spoil
from trainer_kit import (
    CLIP,
    FOREACH,
    FUSED,
    LR,
    OURS,
    STEPS,
    WARMUP,
    assert_as_stock,
    assert_rates,
    distance,
    logged,
)

import fusedlr


def count_clips(trainer: Any, monkeypatch: Any) -> list[float]:
    """The limits that the Trainer's own clipping is called with."""
    limits: list[float] = []
    stock = trainer.accelerator.clip_grad_norm_

    def counted(parameters: Any, max_norm: float, *args: Any) -> Any:
        limits.append(max_norm)
        return stock(parameters, max_norm, *args)

    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", counted)
    return limits


@needs_hook
def test_the_step_clips_and_nothing_else_does(tmp_path, monkeypatch):
    trainer = make(tmp_path, OURS, max_grad_norm=0.1)
    limits = count_clips(trainer, monkeypatch)
    trainer.train()
    assert limits == []
    assert hf.unwrap(trainer.optimizer).max_grad_norm == 0.1
    # logged before clipping
    assert min(logged(trainer).norms) > 0.1


def test_without_clipping_the_norm_is_logged_as_before(tmp_path):
    assert_as_stock(lambda kind: run(tmp_path, kind, max_grad_norm=0.0))


@needs_hook
@pytest.mark.parametrize(("own", "asked", "result"), [(0.1, 0.2, 0.1), (0.3, 0.2, 0.2), (0.1, 0.0, 0.1)])
def test_the_smaller_of_two_limits_holds(tmp_path, monkeypatch, own, asked, result):
    """As if the Trainer and the optimizer clipped one after the other."""
    settings = {"lr": LR, "max_grad_norm": own}
    given = {"optimizer_cls_and_kwargs": (fusedlr.FusedAdamW, settings)}
    trainer = make(tmp_path, OURS, trainer=given, max_grad_norm=asked, max_steps=2)
    limits = count_clips(trainer, monkeypatch)
    trainer.train()
    assert limits == []
    assert hf.unwrap(trainer.optimizer).max_grad_norm == result
    assert min(logged(trainer).norms) > 0.2


def test_independent_groups_are_clipped_together_by_the_trainer(tmp_path, monkeypatch):
    given = {"optimizer_cls_and_kwargs": (fusedlr.FusedAdamW, {"lr": LR, "groups": "independent"})}
    trainer = make(tmp_path, OURS, trainer=given, max_steps=2)
    limits = count_clips(trainer, monkeypatch)
    trainer.train()
    assert limits == [CLIP, CLIP]


@needs_hook
def test_sharded_gradients_are_clipped_by_the_trainer(tmp_path, monkeypatch):
    trainer = make(tmp_path, OURS, max_steps=2)
    trainer.create_optimizer()
    assert hf._can_clip(trainer, trainer.optimizer)
    from accelerate.utils import DistributedType

    for kind in DistributedType:
        monkeypatch.setattr(type(trainer.accelerator), "distributed_type", kind)
        assert hf._can_clip(trainer, trainer.optimizer) == (kind == "NO" or kind.startswith("MULTI_")), kind
    # FSDP 2 hands out parts that say so, whose norm the step computes
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(type(trainer.accelerator), "is_fsdp2", True)
    assert hf._can_clip(trainer, trainer.optimizer)


def test_where_the_hook_is_missing_one_warning_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "CLIP_HOOK", "_clip_grads_some_other_way")
    hf._warn_missing_hook.cache_clear()
    with pytest.warns(UserWarning, match="has no Trainer._clip_grads_some_other_way") as caught:
        for _ in range(2):
            trainer = make(tmp_path, OURS)
            trainer.create_optimizer_and_scheduler(4)
    assert len([w for w in caught if "has no Trainer" in str(w.message)]) == 1
    hf._warn_missing_hook.cache_clear()


def scaled(folder: Path, kind: str, bad: set[int]) -> Any:
    trainer = make(folder, kind)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    spoil(trainer, bad)
    trainer.train()
    return trainer


@needs_hook
def test_after_overflows_the_schedule_has_counted_the_updates_made_where_stock_drifts(tmp_path):
    bad = {1, 4, 5}
    schedule = fusedlr.cosine(warmup_steps=WARMUP, total_steps=STEPS)
    made, expected = 0, []
    for k in range(STEPS):
        expected.append(schedule.lr_at(made, LR))
        made += k not in bad
    ours = scaled(tmp_path, OURS, bad)
    fused = hf.unwrap(ours.optimizer)
    assert_rates(logged(ours).rates, expected)
    assert fused.last_metrics()["step"] == [made] * len(fused.param_groups)
    assert {int(state["step"]) for state in fused.state.values()} == {made}
    assert fused.scheduler.last_epoch == made
    stock = scaled(tmp_path, FUSED, bad)
    # its weights have seen three updates fewer than its schedule
    assert {int(state["step"]) for state in stock.optimizer.state.values()} == {made}
    assert stock.lr_scheduler.last_epoch == STEPS
    assert logged(stock).rates == pytest.approx([schedule.lr_at(k, LR) for k in range(STEPS)])


@needs_hook
def test_loss_scaling_changes_nothing_else(tmp_path):
    plain, scaled_run = run(tmp_path, OURS), logged(scaled(tmp_path, OURS, set()))
    # a power of two is exact
    assert torch.equal(plain.weights, scaled_run.weights)
    assert plain.norms == scaled_run.norms
    assert distance(run(tmp_path, FOREACH), scaled_run) < 1e-6
