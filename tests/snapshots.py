"""Every bit that an optimizer owns, for tests that say what has changed and what has not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import fusedlr


def bits(x: Any) -> Any:
    """Something equal only to the same bits: nan equals nan, and 0.0 is not -0.0."""
    if isinstance(x, Tensor):
        dense = x.detach().to_dense() if x.layout != torch.strided else x.detach()
        if dense.device.type == "meta":
            return x.dtype, tuple(x.shape)
        raw = dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return x.dtype, tuple(x.shape), raw
    if isinstance(x, float):
        return x.hex()
    if isinstance(x, (list, tuple)):
        return type(x), [bits(item) for item in x]
    if isinstance(x, dict):
        return {key: bits(value) for key, value in x.items()}
    return x


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters, group after group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def snapshot(optimizer: torch.optim.Optimizer, *, lr: bool = True) -> dict[str, Any]:
    """Bits of parameters, gradients, state, groups and counters; `lr=False` leaves the rates shown out."""
    params = params_of(optimizer)
    # `k` and `k_at_step` in a group are written by state_dict(); the counts themselves are below
    left_out = ("params", "k", "k_at_step") if lr else ("params", "k", "k_at_step", "lr")
    shot = {
        "params": [bits(p) for p in params],
        "grads": [None if p.grad is None else bits(p.grad) for p in params],
        # `get`, as asking a defaultdict would make an entry
        "state": [bits(dict(optimizer.state.get(p) or {})) for p in params],
        "groups": [
            {key: bits(value) for key, value in group.items() if key not in left_out}
            for group in optimizer.param_groups
        ],
    }
    if isinstance(optimizer, fusedlr.FusedAdamW):
        shot["k"] = bits(optimizer.metrics()["step"])
        shot["skipped"] = bits(optimizer.metrics()["skipped"])
        # what groups have beside their items
        own = [getattr(group, "own", {}) for group in optimizer.param_groups]
        shot["own"] = [{key: bits(x) for key, x in each.items() if x is not None} for each in own]
    return shot


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what differs between two snapshots, for a readable failure."""
    return [name for name in before if before[name] != after[name]]


@contextmanager
def unchanged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """For code that must leave every bit of an optimizer alone, whether it is refused or not."""
    before = snapshot(optimizer)
    yield
    assert not changes(before, snapshot(optimizer))
