"""Runs of the Hugging Face Trainer, ours and stock on one of torch's kernels, with the same arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_kit import (
    CLIP,
    FOREACH,
    LATE,
    LR,
    OURS,
    STEPS,
    WARMUP,
    Outcome,
    examples,
    logged,
    lora_model,
    trainable,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
hf = pytest.importorskip("fusedlr.hf")

needs_hook = pytest.mark.skipif(
    not hasattr(transformers.Trainer, hf.CLIP_HOOK), reason="this transformers clips by itself"
)


def arguments(folder: Path, kind: str = OURS, **options: Any) -> Any:
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": LR,
        "weight_decay": 0.01,
        "adam_beta2": 0.99,
        "lr_scheduler_type": "cosine",
        # gradients have norms of 0.2 to 0.5 here
        "max_grad_norm": CLIP,
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


def make(
    folder: Path, kind: str, model: Any = None, cls: Any = None, trainer: Any = None, **options: Any
) -> Any:
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


_stock: dict[str, Outcome] = {}


def run(folder: Path, kind: str, resume: Any = None, **options: Any) -> Outcome:
    # the same stock run is compared with by many
    key = repr((kind, sorted(options.items())))
    if resume is None and key in _stock:
        return _stock[key]
    trainer = make(folder, kind, **options)
    trainer.train(resume_from_checkpoint=resume)
    result = logged(trainer)
    if kind != OURS and resume is None and not {"save_strategy", "model", "trainer"} & options.keys():
        _stock[key] = result
    return result


def spoil(trainer: Any, updates: set[int]) -> None:
    """Make the gradients of these updates infinite."""

    class Spoil(transformers.TrainerCallback):
        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any
        ) -> None:
            if state.global_step in updates:
                trainable(model)[0].grad.view(-1)[0] = torch.inf

    trainer.add_callback(Spoil())
