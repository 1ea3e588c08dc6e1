"""For test_record.py: what optimizers record of tensors that are spread over processes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fusedlr
from fusedlr import Record, Recording
from sharded.processes import main

# the second parameter has fewer rows than there are processes
NAMES = ("0.weight", "0.bias", "1.weight", "1.bias")
STEPS = 5


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 1))


def optimizer_of(module: nn.Module, **options: Any) -> fusedlr.FusedAdamW:
    schedule = fusedlr.linear(warmup_steps=2, total_steps=12, min_lr_ratio=0.1)
    shared = {"lr": 0.01, "schedule": schedule, "max_grad_norm": 0.1, "record": Record(last=4), **options}
    return fusedlr.FusedAdamW(module.named_parameters(), **shared)


def train(module: nn.Module, optimizer: fusedlr.FusedAdamW, steps: range) -> None:
    for k in steps:
        torch.manual_seed(100 + k)
        optimizer.zero_grad()
        module(torch.randn(8, 7)).square().mean().backward()
        optimizer.step()


def assert_same(ours: Recording, theirs: Recording) -> None:
    assert ours["names"] == theirs["names"]
    for name, values in theirs.items():
        if isinstance(values, np.ndarray):
            np.testing.assert_allclose(
                ours[name].astype(float), values.astype(float), rtol=1e-5, atol=1e-9, err_msg=name
            )


def alone() -> Recording:
    module = model()
    optimizer = optimizer_of(module)
    train(module, optimizer, range(STEPS))
    return optimizer.record()


def shards_are_added(rank: int, processes: int) -> None:
    module = fully_shard(model())
    optimizer = optimizer_of(module)
    train(module, optimizer, range(STEPS))
    assert optimizer.record()["names"] == NAMES
    assert_same(optimizer.record(), alone())


def replicas_are_counted_once(rank: int, processes: int) -> None:
    mesh = init_device_mesh("cpu", (2, processes // 2), mesh_dim_names=("replicas", "shards"))
    module = fully_shard(model(), mesh=mesh)
    optimizer = optimizer_of(module)
    train(module, optimizer, range(STEPS))
    assert_same(optimizer.record(), alone())


def parts_of_a_model_are_listed_together(rank: int, processes: int) -> None:
    torch.manual_seed(rank)
    module = nn.Sequential(nn.Linear(7, 3))
    # what has no name is called alike on every process
    named = [(f"stage{rank}.{name}", p) for name, p in module.named_parameters()] if rank == 1 else None
    options = {"lr": 0.01, "max_grad_norm": 1.0, "record": Record()}
    optimizer = fusedlr.FusedAdamW(
        named or module.parameters(), process_group=distributed.group.WORLD, **options
    )
    train(module, optimizer, range(2))
    recording = optimizer.record()
    assert recording["names"][:2] == ("parameter 0 of group 0", "parameter 1 of group 0")
    assert recording["names"][2:4] == ("stage1.0.weight", "stage1.0.bias")
    assert len(recording["names"]) == 2 * processes
    for part in range(2, processes):
        assert f"parameter 0 of group 0 (part {part})" in recording["names"]
    assert not np.isnan(recording["tensor_grad_norm"]).any()


def without_tensors_there_is_nothing_to_add(rank: int, processes: int) -> None:
    module = fully_shard(model())
    optimizer = optimizer_of(module, record=Record(tensors=False))
    train(module, optimizer, range(2))
    assert optimizer.record()["names"] == () and optimizer.record()["step"].tolist() == [0, 1]


def who_holds_the_tensor_names_it(rank: int, processes: int) -> None:
    module = fully_shard(model())
    optimizer = optimizer_of(module)
    train(module, optimizer, range(2))
    # the last part of the first layer's weight
    if rank == processes - 1:
        module[0].weight.grad._local_tensor.fill_(math.nan)
    holds = rank == processes - 1 and module[0].weight.grad._local_tensor.numel() > 0
    optimizer.step()
    found = optimizer.last_metrics()
    assert found["skipped"] == int(_any(holds))
    named = ("0.weight", 2) if holds else (None, None)
    assert (found["nonfinite_tensor"], found["nonfinite_step"]) == named


def _any(flag: bool) -> bool:
    flags: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(flags, flag)
    return any(flags)


def files_have_a_process_own_part(rank: int, processes: int) -> None:
    module = fully_shard(model())
    optimizer = optimizer_of(module)
    train(module, optimizer, range(3))
    saved = optimizer.state_dict()
    again = optimizer_of(module)
    again.load_state_dict(saved)
    assert_same(again.record(), optimizer.record())
    # of another process the parts are others, and nobody knows the norms
    files: list[Any] = [None] * processes
    distributed.all_gather_object(files, saved["fusedlr"]["record"])
    saved["fusedlr"]["record"] = files[(rank + 1) % processes]
    again.load_state_dict(saved)
    recording = again.record()
    np.testing.assert_allclose(recording["grad_norm"], optimizer.record()["grad_norm"])
    assert np.isnan(recording["tensor_grad_norm"]).all()


def work(rank: int, processes: int, arguments: list[str]) -> None:
    shards_are_added(rank, processes)
    parts_of_a_model_are_listed_together(rank, processes)
    without_tensors_there_is_nothing_to_add(rank, processes)
    who_holds_the_tensor_names_it(rank, processes)
    files_have_a_process_own_part(rank, processes)
    if processes > 2:
        replicas_are_counted_once(rank, processes)


if __name__ == "__main__":
    main(work)
