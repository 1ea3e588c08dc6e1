"""What the host knows of the device's counters, learned without ever waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedlr.reference import Counters, scalar_dtype
from fusedlr.warn import warn

# dynamic loss scaling may skip a few steps while it finds its scale; ten in a row mean something is broken
_SKIPS_TO_WARN = 10


@dataclass
class _Copy:
    """A copy of the counters on its way to the host."""

    values: Tensor
    arrived: torch.Event
    advances: list[int]


class Mirror:
    """Host-side `k` of every group, and the metrics of the last copy that has arrived.

    Between copies the host counts every step as made, so `k` runs ahead by the steps skipped since.
    """

    def __init__(self, counters: Counters) -> None:
        self._advances: list[int] = []
        self.k: list[int] = []
        self._in_flight: _Copy | None = None
        self._warned = False
        self._stale = 0
        self.attach(counters)

    def attach(self, counters: Counters) -> None:
        """Follow these counters from now on, as they stand (waits for the device)."""
        self._counters = counters
        self.sync()

    def advance(self, groups: list[bool]) -> None:
        """Count one step of these groups, to be corrected by the next copy if the device skipped it."""
        self.k = [k + made for k, made in zip(self.k, groups, strict=True)]
        self._advances = [n + made for n, made in zip(self._advances, groups, strict=True)]

    def tell(self, k: list[int], skips_in_row: list[int]) -> None:
        """Take counts that a step on the CPU has left, as `refresh` would find them."""
        self.k = k
        self._warn_skips(skips_in_row)

    def sync(self) -> None:
        """Read the counters now (waits for the device)."""
        values = _pack(self._counters).cpu()
        self._advances = [0] * values.shape[1]
        self._in_flight = None
        self._take(values, self._advances)

    @property
    def metrics(self) -> dict[str, list[Any]]:
        """Per group, as of the last copy that has arrived; as of now on the CPU."""
        if self._counters.k.device.type == "cpu":
            self.sync()
        return self._metrics

    def refresh(self) -> None:
        """Take the last copy that has arrived and start the next one; never waits."""
        device = self._counters.k.device
        if device.type == "cpu":
            # every step does this: what nobody may ask for is left where it is
            k, _, in_row, _ = self._counters.counts.tolist()
            self.tell(k, in_row)
            return
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # nobody may be asked about events then
            return
        if self._in_flight is not None:
            if not self._in_flight.arrived.query():
                return
            self._take(self._in_flight.values, self._in_flight.advances)
        packed = _pack(self._counters)
        values = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        values.copy_(packed, non_blocking=True)
        arrived = torch.Event(device)
        # of the counters' device, which may not be the current one
        arrived.record(torch.accelerator.current_stream(device))
        self._in_flight = _Copy(values, arrived, list(self._advances))

    def _take(self, values: Tensor, advances: list[int]) -> None:
        k, skipped, in_row, stale, lr, norm, coef = values.tolist()
        # steps counted here after the copy was started are not in it
        self.k = [int(a) + now - then for a, now, then in zip(k, self._advances, advances, strict=True)]
        self._metrics: dict[str, list[Any]] = {
            "lr": lr,
            "grad_norm": norm,
            "coef": coef,
            "skipped": [int(x) for x in skipped],
            "step": [int(x) for x in k],
        }
        self._warn_skips(in_row)
        if max(stale, default=0) > self._stale:
            self._stale = int(max(stale))
            raise RuntimeError(
                f"{self._stale} replays of a captured step did nothing: parameters or optimizer state have "
                "been moved, replaced or added since the capture. Capture the CUDA graph again"
            )

    def _warn_skips(self, in_row: Sequence[float]) -> None:
        if self._warned or max(in_row, default=0) < _SKIPS_TO_WARN:
            return
        self._warned = True
        norms = self.metrics["grad_norm"]
        warn(
            f"{int(max(in_row))} optimizer steps in a row were skipped: gradients are inf or nan "
            f"(last gradient norm {max(norms):g})"
        )


def _pack(counters: Counters) -> Tensor:
    """All counters as one matrix (7, groups) of floats, so that one copy takes them."""
    # a backend may keep in fp32 what a step used; `k` would lose its last digits in it
    dtype = scalar_dtype(counters.k.device)
    return torch.cat([counters.counts.to(dtype), counters.used.to(dtype)])
