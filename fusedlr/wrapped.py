"""How the `FusedAdamW` inside a trainer's wrappers is found, and the schedule that it follows."""

from __future__ import annotations

from typing import Any

from fusedlr.optimizer import FusedAdamW
from fusedlr.schedule import Schedule


def unwrap(optimizer: Any) -> FusedAdamW | None:
    """The `FusedAdamW` inside accelerate's wrappers, None where there is none."""
    while optimizer is not None and not isinstance(optimizer, FusedAdamW):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def innermost(optimizer: Any) -> str:
    """The name of the class inside accelerate's wrappers."""
    while getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    return type(optimizer).__name__


def schedule_of(fused: FusedAdamW | None) -> Schedule | None:
    """The first schedule of an optimizer that has any."""
    groups = fused.param_groups if fused is not None else []
    return next((g["schedule"] for g in groups if g.get("schedule") is not None), None)
