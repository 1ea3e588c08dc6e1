"""Which tensors the optimizer keeps of a parameter beside its count of updates, and in which dtype."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedlr.columns import STATE

# those that are running means of the gradients, or their maximum
MOMENTS = tuple(name for name, kept in STATE.items() if kept.dtype is None)


@dataclass(frozen=True)
class Kept:
    """What an optimizer keeps of its parameters.

    Attributes:
        moments: dtype of the moments: None is fp32 for 16-bit parameters, `"param"` the parameter's.
        master_weights: whether the fp32 values of 16-bit parameters are kept.
    """

    moments: str | None = None
    master_weights: bool = False

    def names(self, p: Tensor, group: Mapping[str, Any]) -> tuple[str, ...]:
        """The tensors that are kept of a parameter of this group, in the order of `columns.STATE`."""
        return tuple(
            name
            for name, kept in STATE.items()
            if (kept.of is None or p.dtype == getattr(torch, kept.of))
            and (kept.option is None or (self.master_weights if kept.of else group[kept.option]))
        )

    def dtype(self, name: str, p: Tensor) -> torch.dtype:
        """The dtype in which such a tensor is made."""
        own = STATE[name].dtype
        if own is not None:
            return getattr(torch, own)
        return p.dtype if self.moments == "param" or p.dtype == torch.float64 else torch.float32

    def fits(self, name: str, x: Any, p: Tensor) -> bool:
        """Whether a tensor can be kept under this name as it is: a moment may be wider than it is made."""
        if not isinstance(x, Tensor):
            return False
        own = self.dtype(name, p)
        return x.dtype == (own if name not in MOMENTS else torch.promote_types(x.dtype, own))

    def new(self, name: str, p: Tensor) -> Tensor:
        """Such a tensor before the first update."""
        if name == "master_param":
            return p.detach().to(torch.float32, memory_format=torch.preserve_format, copy=True)
        return torch.zeros_like(p, dtype=self.dtype(name, p), memory_format=torch.preserve_format)


def has_rest(names: Container[str]) -> bool:
    """Whether the state, by what it holds, has the rest of a 16-bit parameter's fp32 value."""
    return "param_remainder" in names or "master_param" in names


def options_of_groups(groups: Any) -> list[tuple[Any, ...]]:
    """Per group the options that decide what is kept of its parameters."""
    names = [kept.option for kept in STATE.values() if kept.option is not None and kept.of is None]
    return [tuple(group[name] for name in names) for group in groups]
