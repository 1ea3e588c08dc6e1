"""For the tests beside it: a linear model, its data, and runs of a Trainer class that take milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fusedlr import hf

LR, STEPS = 1e-2, 6


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.linear(x) - labels).square().mean()}


def rows(count: int = 64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": x, "labels": 4 * x.sum(0, keepdim=True)} for x in torch.randn(count, 4, generator=generator)
    ]


def arguments(folder: Path, **options: Any) -> Any:
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "learning_rate": LR,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(**{**defaults, **options})


def make(cls: Any, folder: Path, trainer: dict[str, Any] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {"model": Linear(), "args": arguments(folder, **options), "train_dataset": rows()}
    made = cls(**{**settings, **(trainer or {})})
    made.remove_callback(transformers.PrinterCallback)
    # a batch of which the loss is the mean
    made.model_accepts_loss_kwargs = False
    return made


def train(cls: Any, folder: Path, **options: Any) -> Any:
    trainer = make(cls, folder, **options)
    trainer.train()
    return trainer


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry and "loss" in entry]


def weights(trainer: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def kinds(trainer: Any) -> tuple[str, str]:
    """Names of the classes of optimizer and scheduler."""
    fused = hf.unwrap(trainer.optimizer)
    inner = fused if fused is not None else trainer.optimizer.optimizer
    return type(inner).__name__, type(trainer.lr_scheduler).__name__
