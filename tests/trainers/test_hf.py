"""The Hugging Face Trainer: every way in trains and logs as the stock Trainer with the same arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_runs import arguments, hf, make, run, transformers
from trainer_kit import (
    CLIP,
    FOREACH,
    FUSED,
    LATE,
    LR,
    OURS,
    STEPS,
    WARMUP,
    Outcome,
    assert_as_stock,
    examples,
    logged,
    lora_model,
    trainable,
)

import fusedlr

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
}

WARMUPLESS = ("constant",)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_trains_and_logs_as_stock(tmp_path, name):
    def train(kind: str) -> Outcome:
        return run(tmp_path, kind, lr_scheduler_type=name, lr_scheduler_kwargs=SCHEDULES[name])

    kinds = (OURS, FUSED, FOREACH) if name in WARMUPLESS else (OURS, FUSED, FOREACH, LATE)
    assert_as_stock(train, kinds)


def test_accumulation_epochs_and_evaluation_in_between(tmp_path):
    def train(kind: str) -> Outcome:
        trainer = make(
            tmp_path,
            kind,
            max_steps=-1,
            num_train_epochs=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=5,
            eval_strategy="steps",
            eval_steps=4,
            trainer={"eval_dataset": examples(4)},
        )
        trainer.train()
        # 24 micro-batches are 4 full updates and a short one
        assert trainer.state.global_step == 15
        # newer versions also evaluate at the end
        assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) in (3, 4)
        return logged(trainer)

    assert_as_stock(train)


def test_the_arguments_reach_the_optimizer_in_the_trainers_own_groups(tmp_path):
    options = {"adam_beta1": 0.8, "adam_epsilon": 1e-6, "weight_decay": 0.1, "max_steps": 1}
    # biases and norms do not decay
    adapters = {"bias": "all", "modules_to_save": ["norm"], "lora_bias": True}
    ours, stock = (make(tmp_path, kind, lora_model(**adapters), **options) for kind in (OURS, FUSED))
    for trainer in (ours, stock):
        trainer.train()
    fused = hf.unwrap(ours.optimizer)
    assert type(fused) is fusedlr.FusedAdamW
    assert fused.max_grad_norm == (CLIP if hasattr(transformers.Trainer, hf.CLIP_HOOK) else None)
    for mine, theirs in zip(fused.param_groups, stock.optimizer.param_groups, strict=True):
        assert [p.shape for p in mine["params"]] == [p.shape for p in theirs["params"]]
        for key in ("betas", "eps", "weight_decay", "initial_lr"):
            assert mine[key] == theirs[key], key
    assert [group["weight_decay"] for group in fused.param_groups] == [0.1, 0.0]
    assert all(group["params"] for group in fused.param_groups)


@pytest.mark.parametrize(
    "adapters",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"], "target_modules": "all-linear"},
    ],
    ids=["rslora", "dora", "modules_to_save"],
)
def test_kinds_of_adapters(tmp_path, adapters):
    assert_as_stock(lambda kind: run(tmp_path, kind, model=lora_model(**adapters)))


def loraplus(model: Any, cls: Any, **options: Any) -> Any:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(model, cls, lr=LR, loraplus_lr_ratio=4, **options)


def test_loraplus_gets_the_schedule_of_the_arguments(tmp_path):
    def train(kind: str) -> Outcome:
        model = lora_model()
        if kind == OURS:
            optimizer = loraplus(model, fusedlr.FusedAdamW)
        else:
            kernel = {"fused": True} if kind == FUSED else {"foreach": True}
            optimizer = loraplus(model, torch.optim.AdamW, **kernel)
        cls = hf.FusedLRTrainer if kind == OURS else transformers.Trainer
        transformers.set_seed(0)
        # no `make`: it would choose the optimizer
        trainer = cls(
            model=model,
            args=arguments(tmp_path, kind),
            train_dataset=examples(48),
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        transformers.set_seed(0)
        trainer.train()
        if kind == OURS:
            assert trainer.lr_scheduler is optimizer.scheduler
            assert max(optimizer.scheduler.base_lrs) == 4 * LR
        return logged(trainer)

    assert_as_stock(train)


def test_an_optimizer_and_its_view_in_a_plain_trainer(tmp_path):
    def train(kind: str) -> Outcome:
        if kind != OURS:
            return run(tmp_path, kind)
        model = lora_model()
        optimizer = fusedlr.FusedAdamW(
            trainable(model),
            lr=LR,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            schedule=fusedlr.cosine(warmup_steps=WARMUP, total_steps=STEPS),
        )
        settings = {"optimizers": (optimizer, optimizer.scheduler)}
        return run(tmp_path, kind, model=model, cls=transformers.Trainer, trainer=settings)

    assert_as_stock(train)


@pytest.mark.parametrize("ours", [transformers.Trainer, hf.FusedLRTrainer])
def test_the_class_and_its_arguments(tmp_path, ours):
    """In a plain Trainer its scheduler drives the optimizer, in ours the optimizer drives itself."""

    def train(kind: str) -> Outcome:
        if kind != OURS:
            return run(tmp_path, kind)
        settings = {"optimizer_cls_and_kwargs": (fusedlr.FusedAdamW, {"lr": LR, "betas": (0.9, 0.99)})}
        trainer = make(tmp_path, kind, cls=ours, trainer=settings)
        trainer.train()
        driven = isinstance(trainer.lr_scheduler, type(hf.unwrap(trainer.optimizer).scheduler))
        assert driven == (ours is hf.FusedLRTrainer)
        return logged(trainer)

    assert_as_stock(train)


class FromYaml(transformers.Trainer):
    """A tool's own Trainer that knows nothing of fusedlr."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        return super().create_scheduler(num_training_steps, optimizer)


def test_patched_transformers_and_back(tmp_path):
    def train(kind: str) -> Outcome:
        if kind != OURS:
            return run(tmp_path, kind)
        with hf.patch_transformers():
            trainer = make(tmp_path, kind, cls=FromYaml)
            trainer.train()
        assert type(hf.unwrap(trainer.optimizer)) is fusedlr.FusedAdamW
        assert any(
            isinstance(callback, hf.FusedLRCallback) for callback in trainer.callback_handler.callbacks
        )
        return logged(trainer)

    before = dict(vars(transformers.Trainer))
    assert_as_stock(train)
    assert dict(vars(transformers.Trainer)) == before


def test_a_patch_is_one_and_is_undone_once(tmp_path):
    before = dict(vars(transformers.Trainer))
    patch = hf.patch_transformers()
    assert hf.patch_transformers() is patch
    assert dict(vars(transformers.Trainer)) != before
    # our class on top of it, and what is not AdamW
    assert make(tmp_path, OURS).get_optimizer_cls_and_kwargs(arguments(tmp_path))[0] is fusedlr.FusedAdamW
    other = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="sgd"))
    assert other[0] is torch.optim.SGD
    patch.undo()
    assert dict(vars(transformers.Trainer)) == before
    patch.undo()
    assert hf.patch_transformers() is not patch
    hf.patch_transformers().undo()


def test_a_patch_under_another_patch_is_not_undone(monkeypatch):
    patch = hf.patch_transformers()
    with monkeypatch.context() as other:
        other.setattr(transformers.Trainer, "create_scheduler", lambda *args: None)
        with pytest.raises(RuntimeError, match=r"Trainer\.create_scheduler was patched again"):
            patch.undo()
    patch.undo()


def test_a_schedule_that_follows_a_metric_stays_the_trainers(tmp_path):
    def train(kind: str) -> Outcome:
        return run(
            tmp_path,
            kind,
            lr_scheduler_type="reduce_lr_on_plateau",
            lr_scheduler_kwargs={"patience": 0, "threshold": 0.5, "factor": 0.7},
            eval_strategy="steps",
            eval_steps=3,
            trainer={"eval_dataset": examples(4)},
        )

    assert_as_stock(train, (OURS, FUSED, FOREACH))


def test_another_optimizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="optim='sgd' is not torch's AdamW"):
        make(tmp_path, OURS, optim="sgd").train()


def test_a_second_train_starts_the_schedule_anew_as_stock(tmp_path):
    def train(kind: str) -> Outcome:
        trainer = make(tmp_path, kind, max_steps=5)
        trainer.train()
        first = logged(trainer)
        transformers.set_seed(1)
        trainer.train()
        second = logged(trainer)
        return Outcome(second.weights, first.rates + second.rates, first.losses + second.losses)

    assert_as_stock(train)
