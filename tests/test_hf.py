"""Hugging Face Trainer on fusedlr: every way in, against the stock Trainer with the same arguments."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import (
    FOREACH,
    FUSED,
    LATE,
    LR,
    OURS,
    Outcome,
    assert_as_stock,
    assert_rates,
    distance,
    examples,
    lora_model,
    stock_adamw,
    trainable,
    weights_of,
)

import fusedlr

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
hf = pytest.importorskip("fusedlr.hf")

STEPS, WARMUP = 12, 3
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
# what torch, transformers and accelerate say when calls come in the wrong order or twice
ORDER = ("before `optimizer.step()`", "lr_scheduler.step", "optimizer.step()", "was assigned to group")


def arguments(folder: Path, kind: str = OURS, **options: Any) -> Any:
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": LR,
        "weight_decay": 0.01,
        "adam_beta2": 0.99,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    warmup = options.pop("warmup_steps", WARMUP) + (kind == LATE)
    return transformers.TrainingArguments(**{**defaults, "warmup_steps": warmup, **options})


def make(folder: Path, kind: str, model: Any = None, cls: Any = None, trainer: Any = None, **options: Any) -> Any:
    """A Trainer of the kind: ours, or stock on one of torch's kernels."""
    model = model if model is not None else lora_model()
    settings: dict[str, Any] = dict(trainer or {})
    if cls is None:
        cls = hf.FusedLRTrainer if kind == OURS else transformers.Trainer
    if kind in (FOREACH, LATE):
        kernel = {"lr": LR, "betas": (0.9, 0.99), "foreach": True}
        settings["optimizer_cls_and_kwargs"] = (torch.optim.AdamW, kernel)
    transformers.set_seed(0)
    made = cls(model=model, args=arguments(folder, kind, **options), train_dataset=examples(48), **settings)
    made.remove_callback(transformers.PrinterCallback)
    # dropout draws from here on
    transformers.set_seed(0)
    return made


def outcome(trainer: Any) -> Outcome:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Outcome(
        weights_of(trainer.model),
        rates=[entry["learning_rate"] for entry in logs],
        losses=[entry["loss"] for entry in logs],
        norms=[entry["grad_norm"] for entry in logs],
    )


def run(folder: Path, kind: str, resume: Any = None, **options: Any) -> Outcome:
    trainer = make(folder, kind, **options)
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer)


@pytest.fixture(autouse=True)
def no_complaints() -> Iterator[None]:
    """No warning about the order of calls or a second scheduler, from anybody."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(warning.message) for warning in caught]
    assert not [text for text in said if any(part in text for part in ORDER)]


# --- the class


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_trains_and_logs_as_stock(tmp_path, name):
    def train(kind: str) -> Outcome:
        return run(tmp_path, kind, lr_scheduler_type=name, lr_scheduler_kwargs=SCHEDULES[name])

    kinds = (OURS, FUSED, FOREACH) if name in WARMUPLESS else (OURS, FUSED, FOREACH, LATE)
    assert_as_stock(train, kinds)
