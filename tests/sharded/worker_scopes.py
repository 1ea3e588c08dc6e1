"""For test_scopes.py: named scopes whose tensors are spread over processes by fully_shard."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import fusedlr
from sharded.processes import main

NAMES = ("a", "b", "c")
SCHEDULE = fusedlr.linear(warmup_steps=2, total_steps=12, min_lr_ratio=0.1)


class Adapters(nn.Module):
    """A model with an adapter of two layers of each name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.adapters = nn.ModuleDict(
            {name: nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 3, bias=False)]) for name in NAMES}
        )

    def forward(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        outputs = []
        for name in names:
            first, second = self.adapters[name]
            outputs.append(second(first(x)).square().mean())
        return torch.stack(outputs).sum()


def sharded() -> Adapters:
    module = Adapters()
    for name in NAMES:
        for layer in module.adapters[name]:
            fully_shard(layer)
    fully_shard(module)
    return module


def optimizer_of(module: Adapters, limits: tuple[float | None, ...] = (0.1, 0.2, 0.3)) -> Any:
    """An optimizer with two groups per adapter."""
    groups = []
    for i, (name, limit) in enumerate(zip(NAMES, limits, strict=True)):
        shared = {"scope": name, "max_grad_norm": limit}
        for j, layer in enumerate(module.adapters[name]):
            groups.append({"params": list(layer.parameters()), "lr": 0.01 * (1 + i + 3 * j), **shared})
    return fusedlr.FusedAdamW(groups, lr=0.01, schedule=SCHEDULE)


def backward(module: Adapters, k: int, names: tuple[str, ...] = NAMES) -> None:
    torch.manual_seed(100 + k)
    module(torch.randn(8, 6), names).backward()


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def assert_same(ours: Any, alone: Any) -> None:
    """Parameters, state and metrics; sharded norms are summed in another order."""
    for mine, theirs in zip(ours.param_groups, alone.param_groups, strict=True):
        assert mine["k"] == theirs["k"] and mine["lr"] == theirs["lr"]
        for p, q in zip(mine["params"], theirs["params"], strict=True):
            torch.testing.assert_close(whole(p), q, rtol=1e-5, atol=1e-7)
            a, b = ours.state.get(p) or {}, alone.state.get(q) or {}
            assert a.keys() == b.keys()
            for name in a:
                torch.testing.assert_close(whole(a[name]), b[name], rtol=1e-4, atol=1e-8)
    a, b = ours.metrics(), alone.metrics()
    for name in a:
        torch.testing.assert_close(a[name], b[name], equal_nan=True, rtol=1e-5, atol=1e-9)


def all_local(optimizer: Any, name: str) -> list[Tensor]:
    """Copies of what this process holds of a scope."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"] if group["scope"] == name else ():
            entry = optimizer.state.get(p) or {}
            found += [getattr(x, "_local_tensor", x).detach().clone() for x in (p, *entry.values())]
    return found


def equals_one_process() -> None:
    mine, theirs = sharded(), Adapters()
    ours, alone = optimizer_of(mine), optimizer_of(theirs)
    turns: list[Any] = [None, "a", ("b", "c"), (), torch.tensor([True, False, True]), ("c",), None]
    for k, only in enumerate(turns):
        for optimizer, module in ((ours, mine), (alone, theirs)):
            backward(module, k)
            optimizer.step(only=only)
            optimizer.zero_grad()
        assert_same(ours, alone)
    # adapters in turns, of which the others have no gradient
    for k, name in enumerate("abcba"):
        for optimizer, module in ((ours, mine), (alone, theirs)):
            backward(module, 20 + k, (name,))
            optimizer.step()
            optimizer.zero_grad()
        assert_same(ours, alone)
    # what is done to one scope
    for optimizer in (ours, alone):
        file = optimizer.scope_state_dict("b")
        optimizer.reset_scope("a", lr=0.05)
        optimizer.load_scope_state_dict("c", file)
    assert_same(ours, alone)
    for k in range(3):
        for optimizer, module in ((ours, mine), (alone, theirs)):
            backward(module, 30 + k)
            optimizer.step(only=("a", "c") if k else None)
            optimizer.zero_grad()
        assert_same(ours, alone)


def an_inf_on_one_process_skips_its_scope_on_all(rank: int) -> None:
    for scaled in (False, True):
        module = sharded()
        ours = optimizer_of(module)
        backward(module, 0)
        ours.step()
        before = {name: all_local(ours, name) for name in NAMES}
        p = ours.param_groups[2]["params"][0]
        if rank == 1:
            p.grad._local_tensor.view(-1)[0] = math.inf
        if scaled:
            # a scaler's flag of this process alone
            ours.grad_scale, ours.found_inf = torch.tensor(1.0), torch.tensor(float(rank == 1))
        ours.step()
        ours.grad_scale = ours.found_inf = None
        metrics = ours.last_metrics()
        assert metrics["scopes"] == NAMES and metrics["skipped"] == [0, 1, 0]
        assert metrics["step"] == [2, 2, 1, 1, 2, 2]
        for name in NAMES:
            same = [torch.equal(x, y) for x, y in zip(before[name], all_local(ours, name), strict=True)]
            assert (
                all(same)
                if name == "b"
                else not any(one for one, x in zip(same, before[name], strict=True) if x.numel())
            )
        # and a scope that does not make the step does not skip it
        ours.step(only=("a", "c"))
        assert ours.last_metrics()["skipped"] == [0, 1, 0]


def a_gradient_on_one_process_makes_the_scopes_step_on_all(rank: int) -> None:
    module = sharded()
    ours = optimizer_of(module)
    backward(module, 0)
    ours.step()
    ours.zero_grad()
    backward(module, 1, ("a",))
    if rank == 1:
        for group in ours.param_groups:
            for p in group["params"]:
                p.grad = None
    ours.step()
    assert ours.last_metrics()["step"] == [2, 2, 1, 1, 1, 1]
    ours.step(only=("b", "c"))
    assert ours.last_metrics()["step"] == [2, 2, 1, 1, 1, 1]


def one_collective_whatever_the_number_of_scopes() -> None:
    module = sharded()
    ours = optimizer_of(module)
    backward(module, 0)
    ours.step()
    calls = []
    group = ours._planner.plan.layout.group
    reduce = type(group).allreduce
    type(group).allreduce = lambda self, *given: calls.append(1) or reduce(self, *given)  # type: ignore
    try:
        for only in (None, "a", ("b", "c")):
            calls.clear()
            ours.step(only=only)
            assert len(calls) == 1, only
    finally:
        type(group).allreduce = reduce


def work(rank: int, processes: int, arguments: list[str]) -> None:
    assert distributed.get_world_size() == 2
    equals_one_process()
    an_inf_on_one_process_skips_its_scope_on_all(rank)
    a_gradient_on_one_process_makes_the_scopes_step_on_all(rank)
    one_collective_whatever_the_number_of_scopes()


if __name__ == "__main__":
    main(work)
