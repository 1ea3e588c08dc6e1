"""For test_checkpoints.py: a run saved by some processes goes on in fewer, as if nothing had happened.

Arguments: a folder; then, but for the run that is compared with, the first and last step of a part of it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

import fusedlr
from sharded.processes import main

STEPS = 9


def build(kind: str = "ours") -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    fully_shard(model)
    if kind == "stock":
        return model, torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1, foreach=False)
    schedule = fusedlr.cosine(warmup_steps=3, total_steps=STEPS) if kind == "ours" else None
    options: dict[str, Any] = {"max_grad_norm": 0.05} if kind == "ours" else {}
    return model, fusedlr.FusedAdamW(
        model.parameters(), lr=0.05, weight_decay=0.1, schedule=schedule, **options
    )


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for k in range(first, last):
        torch.manual_seed(k)
        # the same on every process: gradients are means over them
        model(torch.randn(6, 5, dtype=torch.float64)).square().mean().backward()
        if k == 4:
            for p in model.parameters():
                p.grad.to_local().fill_(float("inf"))  # type: ignore[union-attr]
        if k != 4 or (isinstance(optimizer, fusedlr.FusedAdamW) and optimizer.max_grad_norm):
            optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "scheduler": optimizer.scheduler.state_dict()}


def load(model: nn.Module, optimizer: Any, checkpoint: Path) -> None:
    """Put a checkpoint of `state_of` into a model and its optimizer."""
    saved = state_of(model, optimizer)
    dcp.load(saved, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    optimizer.scheduler.load_state_dict(saved["scheduler"])


def a_part_of_a_run(folder: Path, first: int, last: int) -> None:
    model, optimizer = build()
    if first:
        load(model, optimizer, folder / str(first))
    train(model, optimizer, first, last)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / str(last))
    if last == STEPS:
        for mine, whole in zip(values(model), torch.load(folder / "whole"), strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-12, atol=1e-15)
        assert optimizer.last_metrics()["step"] == [STEPS - 1]


def formats_of_torch() -> None:
    """Every form in which torch hands out an optimizer's state, in the middle of a run."""
    for options in (
        StateDictOptions(),
        StateDictOptions(flatten_optimizer_state_dict=True),
        StateDictOptions(full_state_dict=True),
        StateDictOptions(cpu_offload=True),
    ):
        model, optimizer = build()
        train(model, optimizer, 0, 6)
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        scheduler = optimizer.scheduler.state_dict()
        weights = copy.deepcopy(model.state_dict())
        train(model, optimizer, 6, STEPS)
        other, continued = build()
        other.load_state_dict(weights)
        set_optimizer_state_dict(other, continued, saved, options=options)
        continued.scheduler.load_state_dict(scheduler)
        train(other, continued, 6, STEPS)
        for mine, expected in zip(values(other), values(model), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-13, atol=1e-16)


def a_whole_file() -> None:
    """The file of one process that holds the whole model; then one whose parts are spread otherwise."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    alone = fusedlr.FusedAdamW(whole.parameters(), lr=0.05, weight_decay=0.1)
    train(whole, alone, 0, 4)
    other, ours = build("ours, without a schedule")
    for p, q in zip(other.parameters(), whole.parameters(), strict=True):
        p.data.copy_(distribute_tensor(q.detach(), p.device_mesh, p.placements))  # type: ignore[attr-defined]
    ours.load_state_dict(alone.state_dict())
    train(other, ours, 5, 8), train(whole, alone, 5, 8)
    for mine, expected in zip(values(other), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, expected.detach(), rtol=1e-12, atol=1e-15)
    saved = copy.deepcopy(ours.state_dict())
    entry = saved["state"][0]
    entry["exp_avg"] = entry["exp_avg"].redistribute(placements=[Replicate()])
    before = [gather.clone() for gather in moments(ours)]
    try:
        ours.load_state_dict(saved)
    except ValueError as error:
        assert "its loaded exp_avg is (Replicate(),)" in str(error), str(error)
    else:
        raise AssertionError("a moment that is spread otherwise was loaded")
    assert all(map(torch.equal, moments(ours), before))


def moments(optimizer: Any) -> list[torch.Tensor]:
    return [entry["exp_avg"].full_tensor() for entry in optimizer.state.values()]


def stock_and_back() -> None:
    """A sharded run that changes over to stock AdamW and back is a run of either."""
    model, optimizer = build("stock")
    train(model, optimizer, 0, STEPS)
    mixed, first = build("stock")
    train(mixed, first, 0, 3)
    ours = fusedlr.FusedAdamW(mixed.parameters(), lr=0.05, weight_decay=0.1)
    ours.load_state_dict(first.state_dict())
    train(mixed, ours, 3, 6)
    again = torch.optim.AdamW(mixed.parameters(), lr=0.05, weight_decay=0.1, foreach=False)
    again.load_state_dict(ours.state_dict())
    train(mixed, again, 6, STEPS)
    for mine, expected in zip(values(mixed), values(model), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-15)


def work(rank: int, processes: int, arguments: list[str]) -> None:
    folder, *steps = arguments
    if steps:
        a_part_of_a_run(Path(folder), *map(int, steps))
        return
    model, optimizer = build()
    train(model, optimizer, 0, STEPS)
    whole = values(model)
    if distributed.get_rank() == 0:
        torch.save(whole, Path(folder) / "whole")
    formats_of_torch()
    a_whole_file()
    stock_and_back()


if __name__ == "__main__":
    main(work)
