"""For test_master_weights.py: 16-bit parameters in shards with the rest of their fp32 values, through DCP.

Arguments: a folder and a dtype; then the first and last step of a part of the run, or none for the run in one
process. Of four processes two and two hold the same shards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import fusedlr
from sharded.processes import main
from sharded.worker_checkpoints import load, state_of

STEPS = 8
REST = {torch.bfloat16: ("param_remainder", torch.int16), torch.float16: ("master_param", torch.float32)}


def build(dtype: torch.dtype, processes: int = 0) -> tuple[nn.Module, Any]:
    """A model and its optimizer, in shards if a number of processes is given."""
    torch.manual_seed(0)
    # 7 and 3 rows: parts of different sizes
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)
    if processes == 4:
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    elif processes:
        fully_shard(model)
    schedule = fusedlr.cosine(warmup_steps=2, total_steps=2 * STEPS)
    # most updates are smaller than half the last bit of their parameter
    options: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.1, "amsgrad": True, "max_grad_norm": 1.0}
    return model, fusedlr.FusedAdamW(model.parameters(), schedule=schedule, master_weights=True, **options)


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    """Steps on gradients that are the same however they are spread, as those of a model are only nearly.

    The sums of their squares are exact, so that every order of adding them gives the same norm.
    """
    for k in range(first, last):
        torch.manual_seed(k)
        for p in model.parameters():
            grad = (torch.randint(-8, 9, p.shape) / 8).to(p.dtype)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
        optimizer.step()


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def values(model: nn.Module, optimizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters, and their fp32 values."""
    return [whole(p) for p in model.parameters()], [whole(x) for x in optimizer.master_parameters()]


def a_part_of_a_run(folder: Path, dtype: torch.dtype, processes: int, first: int, last: int) -> None:
    model, optimizer = build(dtype, processes)
    if first:
        load(model, optimizer, folder / str(first))
    train(model, optimizer, first, last)
    for p in model.parameters():
        rest = optimizer.state[p][REST[dtype][0]]
        assert isinstance(rest, DTensor) and rest.dtype == REST[dtype][1]
        assert rest.placements == p.placements  # type: ignore[attr-defined]
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / str(last))
    if last == STEPS:
        expected = torch.load(folder / "whole")
        for mine, theirs in zip(values(model, optimizer), expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


def alone(folder: Path, dtype: torch.dtype) -> None:
    model, optimizer = build(dtype)
    train(model, optimizer, 0, STEPS)
    params, exact = values(model, optimizer)
    # or the rest would not have been needed
    assert any(not torch.equal(p.float(), x) for p, x in zip(params, exact, strict=True))
    torch.save((params, exact), folder / "whole")


def work(rank: int, processes: int, arguments: list[str]) -> None:
    folder, name, *steps = arguments
    dtype = getattr(torch, name)
    if steps:
        a_part_of_a_run(Path(folder), dtype, processes, *map(int, steps))
    else:
        alone(Path(folder), dtype)


if __name__ == "__main__":
    main(work)
