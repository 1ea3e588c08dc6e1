"""How much of themselves tensors moved in the latest recorded step, for whoever logs it; nothing waits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from torch import Tensor

from fusedlr import peft_names
from fusedlr.arrival import Arrival
from fusedlr.columns import SUMS
from fusedlr.record import Ring
from fusedlr.recorder import names_of
from fusedlr.reference import capturing, is_fake

_CHANGE, _BEFORE = SUMS.index("change"), SUMS.index("before")


class Latest:
    """The row of a ring that was written last, as far as the host knows it."""

    def __init__(self) -> None:
        # the copy under way, and of which parameters it is
        self._in_flight: tuple[Arrival, tuple[Tensor, ...]] | None = None
        self._sums: list[list[float]] = []
        self._params: tuple[Tensor, ...] = ()

    def ratios(self, ring: Ring, groups: Sequence[Any]) -> dict[str, float]:
        """The median of |change| / |parameter before| over the tensors of each kind; see `_kinds`.

        Of the latest step on the CPU. From a GPU those of the last copy that has arrived; starts the next.
        """
        self._refresh(ring)
        found: dict[str, list[float]] = {}
        if self._sums:
            changes, befores = self._sums[_CHANGE], self._sums[_BEFORE]
            kinds = _kinds(names_of(self._params, groups), self._params)
            for kind, change, before in zip(kinds, changes, befores, strict=True):
                if change == 0:
                    # also in a skipped step, of which nothing else is known
                    found.setdefault(kind, []).append(0.0)
                # a matrix that starts at 0 moves infinitely much of itself; -1 is of one without a gradient
                elif change < math.inf and before > 0:
                    found.setdefault(kind, []).append(math.sqrt(change / before))
        return {kind: median(found[kind]) for kind in sorted(found)}

    def _refresh(self, ring: Ring) -> None:
        device = ring.steps.device
        if is_fake(ring.steps) or not ring.record.tensors:
            return
        if device.type == "cpu":
            self._params, self._sums = ring.params, _row(ring)[0].tolist()
        # events cannot be queried while a graph is captured
        elif not capturing(device):
            self._take_arrived(ring)

    def _take_arrived(self, ring: Ring) -> None:
        if self._in_flight is not None:
            arrival, params = self._in_flight
            values = arrival.values()
            if values is None:
                return
            self._params, self._sums = params, values[0]
        self._in_flight = Arrival(_row(ring)), ring.params


def _row(ring: Ring) -> Tensor:
    """The sums of the latest step, (1, 3, params); of a ring without steps a row without values."""
    return ring.sums.index_select(0, (ring.steps - 1) % ring.record.last)


def _kinds(names: Sequence[str], params: Sequence[Tensor]) -> Iterator[str]:
    """`lora_A`, `lora_B`, other `matrices` and `vectors`; of several adapters `lora_A/first` and so on."""
    adapters = [peft_names.adapter_of(name) for name in names]
    several = len({adapter for adapter in adapters if adapter is not None}) > 1
    for name, adapter, p in zip(names, adapters, params, strict=True):
        kind = peft_names.kind(name)
        if kind == "other":
            kind = "matrices" if p.ndim > 1 else "vectors"
        yield f"{kind}/{adapter}" if several and adapter is not None else kind


__all__ = ["Latest"]
