"""`Record`, which asks an optimizer to record its steps, and `Ring`, where they are recorded on the device.

The step's own kernels write a ring; recorder.py reads it. What its rows hold is listed in columns.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedlr import arguments
from fusedlr.columns import RECORDED, SUMS

# rows of a ring; at 448 tensors that many take 11 GB
MOST = 2**20


@dataclass(frozen=True)
class Record:
    """How much of a run an optimizer records: `FusedAdamW(record=Record())`, read by `optimizer.record()`.

    The step's own kernels write it on the device, without a copy to the host. With `tensors`, 448 tensors and
    1,024 steps take 11 MB on a CPU, and half of that on a GPU.

    Args:
        last: how many steps are kept, the latest ones; from 1 to 2**20.
        tensors: whether the norm of every tensor's gradient and of its change are recorded, too.

    Raises:
        ValueError: an argument is out of range.

    >>> import torch, fusedlr
    >>> p = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = fusedlr.FusedAdamW([("w", p)], lr=0.5, record=fusedlr.Record(last=100))
    >>> p.grad = torch.tensor([3.0, 4.0])
    >>> optimizer.step()
    >>> recording = optimizer.record()
    >>> recording["names"], recording["lr"].tolist(), recording["tensor_grad_norm"].tolist()
    (('w',), [[0.5]], [[5.0]])
    """

    last: int = 1024
    tensors: bool = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "last", arguments.count("last", self.last, 1, MOST))
        arguments.flag("tensors", self.tensors)


@dataclass(frozen=True)
class Ring:
    """What the last steps used and did. Step `n` is in row `n % last`; a row without a step has -1.

    Attributes:
        params: those whose sums of squares are recorded, in the order of the columns; empty without
            `tensors`.
        steps: int64 of shape (1,): the `step()` calls so far, which is the number of the next one.
        ints: int64 of shape (last, 1 + groups): the number of the step; then per group its k, -1 where it
            took no part.
        used: of shape (last, 5, groups): the rows `columns.RECORDED`, nan where a group took no part. Its
            dtype is that of `reference.Counters.used`.
        sums: of shape (last, 3, params), the dtype of `used`: the rows `columns.SUMS`, -1 where a parameter
            had no gradient or took no part. Of a skipped step the last two are 0.
    """

    record: Record
    params: tuple[Tensor, ...]
    steps: Tensor
    ints: Tensor
    used: Tensor
    sums: Tensor

    @staticmethod
    def empty(record: Record, groups: int, device: torch.device, dtype: torch.dtype) -> Ring:
        """One without steps and parameters."""
        last = record.last
        return Ring(
            record,
            (),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.full((last, 1 + groups), -1, dtype=torch.int64, device=device),
            torch.full((last, len(RECORDED), groups), math.nan, dtype=dtype, device=device),
            torch.full((last, len(SUMS), 0), -1.0, dtype=dtype, device=device),
        )

    def layout(self) -> tuple[int, int, int, int, int, int]:
        """Where its tensors lie in memory, and how many rows and columns there are, for compiled steps."""
        addresses = (x.data_ptr() for x in (self.steps, self.ints, self.used, self.sums))
        return *addresses, self.record.last, self.sums.shape[2]  # type: ignore[return-value]

    def of_groups(self, origins: Sequence[int | None], device: torch.device, dtype: torch.dtype) -> Ring:
        """The same steps for other groups: `origins` says which group of this ring each was, if any."""
        new = Ring.empty(self.record, len(origins), device, dtype)
        new.steps.copy_(self.steps)
        new.ints[:, 0] = self.ints[:, 0]
        for i, origin in enumerate(origins):
            if origin is not None:
                new.ints[:, 1 + i] = self.ints[:, 1 + origin]
                new.used[:, :, i] = self.used[:, :, origin]
        return Ring(self.record, self.params, new.steps, new.ints, new.used, self.sums.to(device, dtype))

    def of_params(self, params: Sequence[Tensor]) -> Ring:
        """The same steps for other parameters: those that were there keep their columns' values."""
        if not self.record.tensors or (
            len(params) == len(self.params) and all(p is q for p, q in zip(params, self.params, strict=True))
        ):
            return self
        column = {id(p): i for i, p in enumerate(self.params)}
        sums = self.sums.new_full((*self.sums.shape[:2], len(params)), -1.0)
        for i, p in enumerate(params):
            if id(p) in column:
                sums[:, :, i] = self.sums[:, :, column[id(p)]]
        return Ring(self.record, tuple(params), self.steps, self.ints, self.used, sums)


__all__ = ["MOST", "Record", "Ring"]
