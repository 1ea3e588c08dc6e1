"""For test_tools.py: a Trainer's run over two processes, whose clocks differ, cools down by an hour.

Argument: a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import fusedlr.hf
from sharded.processes import main

SECONDS = 100.0


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.linear(x) - labels).square().mean()}


class Clock(transformers.TrainerCallback):
    """Updates take 1 second on the first process, and 3 on the other."""

    def __init__(self, rank: int) -> None:
        self.now, self.pace = 1e9, 1.0 + 2.0 * rank

    def __call__(self) -> float:
        return self.now

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now += self.pace


def work(rank: int, processes: int, arguments: list[str]) -> None:
    args = transformers.TrainingArguments(
        str(Path(arguments[0])),
        max_steps=1000,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    assert args.world_size == processes
    torch.manual_seed(0)
    rows = [{"x": x, "labels": x.sum(0, keepdim=True)} for x in torch.randn(64, 4)]
    clock = Clock(rank)
    cooldown = fusedlr.hf.Cooldown(20, finish_by=SECONDS, clock=clock)
    trainer = fusedlr.hf.FusedLRTrainer(Model(), args, train_dataset=rows, callbacks=[clock, cooldown])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    fused = fusedlr.hf.unwrap(trainer.optimizer)
    assert fused is not None
    begun = [group["schedule"].changes for group in fused.param_groups]
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist()
    found: list[Any] = [None] * processes
    torch.distributed.all_gather_object(found, (trainer.state.global_step, begun, weights))
    # every process has done the same, by the first one's clock, and at most one look early
    assert all(one == found[0] for one in found), found
    assert SECONDS - 8 < trainer.state.global_step <= SECONDS, found
    assert begun[0][-1].steps == 20 and len(begun[0]) == 1, begun


if __name__ == "__main__":
    main(work)
