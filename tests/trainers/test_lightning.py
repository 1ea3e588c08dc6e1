"""Lightning's Trainer: its LearningRateMonitor, clipping, accumulation and checkpoints, against stock."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

import pytest
import torch
from trainer_kit import (
    CLIP,
    OURS,
    STEPS,
    Outcome,
    assert_as_stock,
    examples,
    lora_model,
    optimizers,
    trainable,
    weights_of,
)

import fusedlr

lightning = pytest.importorskip("lightning")
pytest.importorskip("peft")


class Module(lightning.LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.model = kind, lora_model()
        self.model.train()
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Any:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        assert self.trainer.max_epochs == 1 or self.trainer.estimated_stepping_batches == STEPS
        optimizer, scheduler = optimizers(self.kind, trainable(self), max_grad_norm=CLIP)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Memory(lightning.pytorch.loggers.logger.DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.rates += [value for name, value in metrics.items() if name.startswith("lr-")]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No banner."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "level", logging.ERROR)


def train(kind: str, rows: Any = None, save: Any = None, resume: Any = None) -> Outcome:
    """Two epochs of ten updates, each of two batches; with `save` the first epoch alone."""
    lightning.seed_everything(0, verbose=False)
    module, logger = Module(kind), Memory()
    trainer = lightning.Trainer(
        max_steps=STEPS,
        max_epochs=1 if save else None,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=1 if rows else 2,
        # the step clips, and Lightning's clipping refuses optimizers that unscale
        gradient_clip_val=None if kind == OURS else CLIP,
        callbacks=[lightning.pytorch.callbacks.LearningRateMonitor(logging_interval="step")],
        enable_checkpointing=False,
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(rows or examples(2 * STEPS), batch_size=2)
    lightning.seed_everything(1, verbose=False)
    trainer.fit(module, loader, ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    return Outcome(weights_of(module), logger.rates, module.losses)


def test_the_trainer_trains_and_monitors_as_with_stock():
    # the monitor looks at every micro-batch
    assert_as_stock(train)


def test_a_resumed_run_is_the_run(tmp_path, monkeypatch):
    # Lightning does not keep the generators from which dropout would draw
    without_dropout = functools.partial(lora_model, lora_dropout=0.0)
    monkeypatch.setattr(sys.modules[__name__], "lora_model", without_dropout)
    # and it begins a resumed run with a batch too many, with stock as well: here all batches are alike
    rows = examples(2) * 10
    whole = train(OURS, rows)
    train(OURS, rows, save=tmp_path / "half.ckpt")
    resumed = train(OURS, rows, resume=tmp_path / "half.ckpt")
    assert torch.equal(resumed.weights, whole.weights)
    assert resumed.rates == whole.rates[10:]
    assert resumed.losses == whole.losses[10:]


def test_lightnings_own_clipping_needs_amp_scaling_switched_off():
    module = Module(OURS)
    plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cuda", scaler=object())
    for amp_scaling in (True, False):
        optimizer = fusedlr.FusedAdamW(trainable(module), amp_scaling=amp_scaling)
        if amp_scaling:
            with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
                plugin.clip_gradients(optimizer, 1.0)
        else:
            plugin.clip_gradients(optimizer, 1.0)
