"""Checks of what users pass to the optimizer; every error names the argument and its value."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import Tensor

from fusedlr.schedule import Schedule


def choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """`value` is one of `choices`, else ValueError."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown, expected one of {', '.join(map(repr, choices))}")


def schedule(schedule: Any) -> None:
    """None or a `Schedule`, else TypeError."""
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule={schedule!r} is not a fusedlr.Schedule: build one with fusedlr.cosine(...), "
            "fusedlr.from_hf(...) or fusedlr.from_torch(...)"
        )


def max_grad_norm(value: Any) -> float | None:
    """None or a float above 0 (inf measures the norm and never clips), else ValueError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) > 0:
        raise ValueError(f"max_grad_norm={value!r} must be a number above 0, or None for no clipping")
    return float(value)


def betas(betas: Any) -> tuple[float, float]:
    """Two floats, else ValueError."""
    try:
        b1, b2 = (float(b) for b in betas)
    except (TypeError, ValueError):
        raise ValueError(f"betas={betas!r} must be two numbers") from None
    return b1, b2


def hyperparameters(group: dict[str, Any]) -> None:
    """`lr`, `eps`, `weight_decay` and `betas` are in range, else ValueError."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr has shape {tuple(lr.shape)}, a tensor lr must have one element")
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if not (isinstance(value, (Real, Tensor)) and float(value) >= 0):
            raise ValueError(f"{name}={value!r} must be a number >= 0")
    for i, b in enumerate(betas(group["betas"])):
        if not 0 <= b < 1:
            raise ValueError(f"betas[{i}]={b!r} must be in [0, 1)")


def duplicates(params: list[Any]) -> None:
    """No parameter, named or not, is in the list twice, else ValueError."""
    seen: dict[int, int] = {}
    for i, item in enumerate(params):
        p = item[1] if isinstance(item, tuple) else item
        if id(p) in seen:
            name = f" ({item[0]!r})" if isinstance(item, tuple) else ""
            raise ValueError(
                f"params[{i}]{name} is the same tensor as params[{seen[id(p)]}]: it would be updated twice"
            )
        seen[id(p)] = i


def one_element(name: str, value: Any) -> Any:
    """What a scaler leaves: None, a number, or a tensor of one element whatever its shape."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected one element")
    return value
