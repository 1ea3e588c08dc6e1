"""torchtune: a scheduler for recipes, which call it with the optimizer and the length of the run.

optimizer:
  _component_: fusedlr.FusedAdamW
  lr: 3e-4
  max_grad_norm: 1.0
lr_scheduler:
  _component_: fusedlr.integrations.torchtune.lr_scheduler
  name: cosine
  num_warmup_steps: 100
"""

from __future__ import annotations

from typing import Any

from fusedlr.optimizer import FusedAdamW
from fusedlr.schedule import from_hf
from fusedlr.scheduler import ScheduleView


def lr_scheduler(
    optimizer: FusedAdamW,
    num_training_steps: int,
    last_epoch: int = -1,
    name: str = "cosine",
    num_warmup_steps: int = 0,
    **arguments: Any,
) -> ScheduleView:
    """Give the optimizer a schedule of transformers by its name, and return the optimizer's view of it.

    A run that is resumed goes on at the optimizer's own count of updates if its state has been loaded, else
    behind `last_epoch`.

    Args:
        optimizer: not the one that steps in the backward pass.
        num_training_steps: updates in the run.
        last_epoch: the recipe's count of updates made, less one.
        name: as `fusedlr.from_hf` takes it, a name of transformers.
        num_warmup_steps: updates of warm-up, as `fusedlr.from_hf` takes them.
        **arguments: the schedule's own, as `fusedlr.from_hf` takes them.

    Raises:
        TypeError: the optimizer is another one.

    >>> import torch, fusedlr
    >>> optimizer = fusedlr.FusedAdamW([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    >>> lr_scheduler(optimizer, 10, num_warmup_steps=2).lr_lambdas[0](1)
    0.5
    """
    if not isinstance(optimizer, FusedAdamW):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, which this scheduler cannot drive: name "
            "fusedlr.FusedAdamW as the optimizer's component, with optimizer_in_bwd: False"
        )
    made = max(optimizer.metrics()["step"].tolist(), default=0)
    optimizer.start_schedule(from_hf(name, num_warmup_steps, num_training_steps, **arguments))
    optimizer.scheduler.load_state_dict({"last_epoch": made or last_epoch + 1})
    return optimizer.scheduler
