"""TRL's SFTTrainer with the mixin in front, against SFTTrainer alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_kit import (
    CLIP,
    FUSED,
    LATE,
    LR,
    OURS,
    STEPS,
    WARMUP,
    Outcome,
    assert_as_stock,
    logged,
    lora_model,
    tiny_llama,
)

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
hf = pytest.importorskip("fusedlr.hf")

WORDS = [f"w{i}" for i in range(60)]


class FusedSFTTrainer(hf.FusedLRTrainerMixin, trl.SFTTrainer):
    pass


def tokenizer() -> Any:
    vocabulary = {word: i for i, word in enumerate(["<end>", "<pad>", "<unknown>", *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unknown>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", pad_token="<pad>")


def texts() -> Any:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, len(WORDS), (96, 6), generator=generator).tolist()
    return datasets.Dataset.from_list(
        [{"text": " ".join(f"{WORDS[i]} {WORDS[i]}" for i in row)} for row in rows]
    )


def train(kind: str, folder: Path, resume: Any = None) -> Outcome:
    args = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=LR,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP + (kind == LATE),
        max_grad_norm=CLIP,
        logging_steps=1,
        save_steps=10,
        save_strategy="steps" if kind == OURS else "no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        max_length=16,
    )
    options: dict[str, Any] = {}
    if kind not in (OURS, FUSED):
        options["optimizer_cls_and_kwargs"] = (torch.optim.AdamW, {"lr": LR, "foreach": True})
    transformers.set_seed(0)
    cls = FusedSFTTrainer if kind == OURS else trl.SFTTrainer
    trainer = cls(
        model=tiny_llama(),
        args=args,
        train_dataset=texts(),
        processing_class=tokenizer(),
        peft_config=lora_model().peft_config["default"],
        **options,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    transformers.set_seed(0)
    trainer.train(resume_from_checkpoint=resume)
    return logged(trainer)


def test_sft_trains_logs_and_resumes_as_stock(tmp_path):
    runs: dict[str, Outcome] = {}

    def keep(kind: str) -> Outcome:
        runs[kind] = train(kind, tmp_path / kind)
        return runs[kind]

    assert_as_stock(keep)
    resumed = train(OURS, tmp_path / "again", resume=str(tmp_path / OURS / "checkpoint-10"))
    assert torch.equal(resumed.weights, runs[OURS].weights)
    assert (resumed.rates, resumed.losses) == (runs[OURS].rates, runs[OURS].losses)
