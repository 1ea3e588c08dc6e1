"""What a GPU keeps for an optimizer from plan to plan, because CUDA graphs may have captured its launches.

A captured launch reads the same tables at every replay. Those of options are written over in place, so that
it follows; those of rows are never written to again. What it was given stays alive, and the generation makes
it inert once rows or addresses are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedlr.backends.gpu.tables import Table
from fusedlr.columns import SUMS
from fusedlr.reference import Counters, capturing

# far more than there are sets of scopes that a run steps in turns
_MOST_FLAGS = 256


class Graphs:
    """Tables, tickets and the generation of one optimizer on one device; `Counters.graphs` has it.

    Attributes:
        number: the generation as the host knows it. generation: the same on the device, int32 of shape (1,):
        a launch made for another number does nothing but count that it was stale.
        tensors, chunks: the rows, and how they are cut into chunks. gradients: addresses, for launches that
        do not carry them. ints, floats: the options, see `tables.Packed`. rates: fp32 of shape (groups,):
        rates that are given as numbers.
        ring: where steps are recorded.
        tickets: int32 of shape (2,): programs of the norm's and the update's launches that have come to their
        end. one, zero: the scaler's signals where there is no scaler.
    """

    def __init__(self, device: torch.device, before: Graphs | None = None) -> None:
        self.device = device
        # graphs on another device go on reading what they were captured with
        self._before = before
        self.number = 0
        self.generation = torch.zeros(1, dtype=torch.int32, device=device)
        self.tensors, self.gradients = Table(device, torch.int64), Table(device, torch.int64)
        self.chunks, self.ring = Table(device, torch.int32), Table(device, torch.int64)
        # what scopes do, as steps have needed it -> the table of it
        self._flags: dict[tuple[bool, ...], Tensor] = {}
        self._chunk_sums = torch.empty(0)
        self.ints = Table(device, torch.int64)
        self.floats, self.rates = Table(device, torch.float32), Table(device, torch.float32)
        self.tickets = torch.zeros(2, dtype=torch.int32, device=device)
        self.one = torch.ones(1, dtype=torch.float32, device=device)
        self.zero = torch.zeros(1, dtype=torch.float32, device=device)
        # what captured launches of this generation were made for; None if there are none
        self._captured_for: Any = None
        self._pinned: list[Any] = []

    @staticmethod
    def of(counters: Counters) -> Graphs:
        """Those of an optimizer, made if it has none on this device."""
        device, old = counters.k.device, counters.graphs
        if old is None or old.device != device:
            if old is not None:
                old.outdate()
            counters.graphs = Graphs(device, old)
        return counters.graphs

    def flags(self, of_scopes: Sequence[bool]) -> Tensor:
        """A flag of every scope as int32 on the device, which is never written to again."""
        key = tuple(of_scopes)
        if key not in self._flags:
            table = Table(self.device, torch.int32).renew([int(flag) for flag in key])
            if len(self._flags) >= _MOST_FLAGS:
                self._flags.clear()
            self._flags[key] = table
        return self._flags[key]

    def chunk_sums(self, programs: int) -> Tensor:
        """Where a step leaves what it records of every chunk: fp32 of shape (len(SUMS), programs).

        Its address is in the table `ring`. It is the same for plans of as many programs, so that a step that
        had to be prepared anew can be captured.
        """
        if self._chunk_sums.shape != (len(SUMS), programs):
            self._chunk_sums = torch.empty((len(SUMS), programs), dtype=torch.float32, device=self.device)
        return self._chunk_sums

    @property
    def is_captured(self) -> bool:
        """Whether there are captured launches of this generation."""
        return self._captured_for is not None

    def expect(self, made_for: Any) -> None:
        """Outdate captured launches, unless they were made for equal rows and addresses."""
        if self._captured_for is not None and self._captured_for != made_for:
            self.outdate()

    def pin(self, made_for: Any, *given: Any) -> None:
        """Keep alive what captured launches have been given."""
        self._captured_for = made_for
        self._pinned.append(given)

    def outdate(self) -> None:
        """Let the launches captured so far do nothing when they are replayed."""
        if self._captured_for is None:
            return
        if capturing(self.device):
            # the device would hear of it in a replay only
            raise RuntimeError(
                "tensors have changed since the last step outside the CUDA graph: make one before capturing"
            )
        self.number += 1
        self.generation.fill_(self.number)
        self._captured_for = None
