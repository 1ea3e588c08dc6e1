"""What a GPU keeps for an optimizer from plan to plan, because CUDA graphs may have captured its launches.

A captured launch reads the same tables at every replay. Those of options are written over in place, so that
it follows; those of rows are never written to again. What it was given stays alive, and the generation makes
it inert once rows or addresses are others.
"""

from __future__ import annotations

from typing import Any

import torch

from fusedlr.backends.gpu.tables import Table
from fusedlr.reference import Counters, capturing


class Graphs:
    """Tables, tickets and the generation of one optimizer on one device; `Counters.graphs` has it.

    Attributes:
        number: the generation as the host knows it. generation: the same on the device, int32 of shape (1,):
        a launch made for another number does nothing but
            count that it was stale.
        tensors, chunks: the rows, and how they are cut into chunks. active, always: int32 of shape (scopes,):
        which of them make the step, and which make every step. gradients: addresses, for launches that do not
        carry them. ints, floats: the options, see `tables.Packed`. rates: fp32 of shape (groups,): rates that
        are given as numbers.
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
        self.chunks, self.active = Table(device, torch.int32), Table(device, torch.int32)
        self.always = Table(device, torch.int32)
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
