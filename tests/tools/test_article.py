"""The usual fine-tuning recipe, word for word, on a tiny model: one word changes in the script.

`TrainingArguments` and `LoraConfig` are those that articles on LoRA print; the run is long enough to pass
the 200 updates of warm-up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_kit import (
    FUSED,
    LATE,
    OURS,
    Outcome,
    assert_as_stock,
    assert_rates,
    examples,
    logged,
    tiny_llama,
)

import fusedlr

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
hf = pytest.importorskip("fusedlr.hf")

pytestmark = pytest.mark.usefixtures("quick")

# 75 updates per epoch
EXAMPLES, UPDATES, WARMUP, SAVED_AT = 2400, 225, 200, 210


def arguments(folder: Path) -> Any:
    """As printed, but for where files go, what this machine cannot do, and silence."""
    return transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
        learning_rate=1e-5,
        num_train_epochs=3,
        logging_steps=10,
        save_steps=500,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        fp16=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


class SaveAt(transformers.TrainerCallback):
    """A checkpoint in the middle, for which `save_steps` is too large; where a logged mean of losses ends."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == SAVED_AT:
            control.should_save = True


def finetune(cls: Any, folder: Path, warmup: int = WARMUP, resume: Any = None, **options: Any) -> Outcome:
    config = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    transformers.set_seed(0)
    model = peft.get_peft_model(tiny_llama(), config)
    args = arguments(folder)
    args.warmup_steps = warmup
    trainer = cls(model=model, args=args, train_dataset=examples(EXAMPLES), callbacks=[SaveAt()], **options)
    trainer.remove_callback(transformers.PrinterCallback)
    transformers.set_seed(0)
    trainer.train(resume_from_checkpoint=resume)
    return logged(trainer)


def train(folder: Path, kind: str) -> Outcome:
    if kind == OURS:
        return finetune(hf.FusedLRTrainer, folder / kind)
    options: dict[str, Any] = {}
    if kind != FUSED:
        options["optimizer_cls_and_kwargs"] = (torch.optim.AdamW, {"lr": 1e-5, "foreach": True})
    return finetune(transformers.Trainer, folder / kind, WARMUP + (kind == LATE), **options)


@pytest.mark.slow
def test_the_recipe_gives_what_stock_gives_and_resumes_without_a_trace(tmp_path):
    runs: dict[str, Outcome] = {}

    def keep(kind: str) -> Outcome:
        runs[kind] = train(tmp_path, kind)
        return runs[kind]

    assert_as_stock(keep)
    whole = runs[OURS]
    assert len(whole.rates) == UPDATES // 10
    # the tenth update, and the last one logged
    schedule = fusedlr.cosine(warmup_steps=WARMUP, total_steps=UPDATES)
    assert_rates(whole.rates, [schedule.lr_at(k, 1e-5) for k in range(9, UPDATES, 10)])
    resumed = finetune(
        hf.FusedLRTrainer, tmp_path / "again", resume=str(tmp_path / OURS / f"checkpoint-{SAVED_AT}")
    )
    assert torch.equal(resumed.weights, whole.weights)
    assert (resumed.rates, resumed.losses, resumed.norms) == (whole.rates, whole.losses, whole.norms)
