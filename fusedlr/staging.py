"""Tables on a device that follow lists of numbers on the host: uploaded when they change, without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Table:
    """One table; `put` returns a tensor that holds the given values for the work queued after it."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._values: list[Any] | None = None
        self._tensor = torch.empty(0, dtype=dtype, device=device)
        # pinned memory, and when the device has last read it
        self._staged: list[tuple[Tensor, torch.Event]] = []
        # what a CUDA graph was captured with stays as it is for as long as the graph may be replayed
        self._captured: list[Tensor] = []
        # memory for the next capture: to pin some asks the driver about events, which ends a capture
        self._spare: Tensor | None = None

    def put(self, values: list[Any], *, pinned_to_graph: bool = False) -> Tensor:
        """The table with these values; the list is kept, so it must not be changed later.

        While a CUDA graph is captured, a table that is `pinned_to_graph` becomes the graph's own.
        """
        if pinned_to_graph and capturing(self._device):
            return self._capture(values)
        if values is not self._values and values != self._values:
            if capturing(self._device):
                # the copy would become part of the graph, and every replay would bring back these values
                raise RuntimeError(
                    "a hyperparameter has changed since the last step outside a CUDA graph: make one step "
                    "before the capture"
                )
            self._upload(values)
            self._values = values
            self._spare = None
        if pinned_to_graph and self._spare is None:
            pin = self._device.type != "cpu"
            self._spare = torch.empty(len(values), dtype=self._dtype, device="cpu", pin_memory=pin)
        return self._tensor

    def _upload(self, values: Sequence[Any]) -> None:
        host = self._on_host(values)
        # never empty: kernels may look at the first row of nothing
        length = max(len(values), 1)
        if self._tensor.numel() != length:
            self._tensor = torch.zeros(length, dtype=self._dtype, device=self._device)
            self._staged.clear()
        if self._device.type == "cpu":
            self._tensor[: len(values)] = host
        elif len(values):
            pinned, read = self._free()
            pinned.copy_(host)
            self._tensor.copy_(pinned, non_blocking=True)
            # of the table's device, which may not be the current one
            read.record(torch.accelerator.current_stream(self._device))

    def _on_host(self, values: Sequence[Any]) -> Tensor:
        if self._device.type == "xpu" and self._dtype == torch.int64:
            # its addresses have the highest bit set
            values = [x - 2**64 if x >= 2**63 else x for x in values]
        return torch.tensor(values, dtype=self._dtype, device="cpu")

    def _free(self) -> tuple[Tensor, torch.Event]:
        """Pinned memory that the device is not reading."""
        for staged in self._staged:
            if staged[1].query():
                return staged
        self._staged.append(
            (torch.empty_like(self._tensor, device="cpu", pin_memory=True), torch.Event(self._device))
        )
        return self._staged[-1]

    def _capture(self, values: Sequence[Any]) -> Tensor:
        pinned, self._spare = self._spare, None
        if pinned is None or pinned.numel() != len(values):
            raise RuntimeError(
                "make one step outside the CUDA graph before every capture, with gradients for the same "
                "parameters: what the graph needs is allocated there"
            )
        pinned.copy_(self._on_host(values))
        tensor = torch.empty_like(pinned, device=self._device)
        tensor.copy_(pinned, non_blocking=True)
        self._captured += pinned, tensor
        return tensor


def capturing(device: torch.device) -> bool:
    """Whether what is queued now becomes part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
