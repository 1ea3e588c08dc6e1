"""A copy of numbers from a GPU to the host that nothing waits for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Arrival:
    """A tensor's values on their way to the host, copied behind the work that is queued on its device."""

    def __init__(self, source: Tensor) -> None:
        self._values = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._values.copy_(source, non_blocking=True)
        self._event = torch.Event(source.device)
        # of the tensor's device, which may not be the current one
        self._event.record(torch.accelerator.current_stream(source.device))

    def values(self) -> list[Any] | None:
        """The values as lists; None while they are on their way."""
        return self._values.tolist() if self._event.query() else None


__all__ = ["Arrival"]
