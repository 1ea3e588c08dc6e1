"""Rows whose elements do not lie in the same order in all their tensors: stepped on contiguous copies."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedlr.reference import (
    Counters,
    GroupStep,
    Inputs,
    Made,
    Row,
    Scope,
    Signals,
    Stepper,
    capturing,
    is_fake,
)


class StepInputs:
    """The inputs of one step, gathered in Python: see `reference.Inputs`."""

    def __init__(self, rows: Sequence[Row], rates: Sequence[Any]) -> None:
        self._rows = rows
        self._gradients = array("Q", [address_of_gradient(row) for row in rows])
        self._rates = array("d", [float("nan") if isinstance(x, Tensor) else float(x) for x in rates])
        self.gradients_at = self._gradients.buffer_info()[0]
        self.rates_at = self._rates.buffer_info()[0]
        self.presence = 0

    @property
    def gradients(self) -> list[int]:
        """Per row the address of its gradient, 0 where there is none."""
        return self._gradients.tolist()

    @property
    def rates(self) -> list[float]:
        """Per group the rate that is given as a number, nan where it is a tensor."""
        return self._rates.tolist()

    def increment_versions(self, groups: Sequence[bool] | None = None) -> None:
        """Tell autograd that parameters with a gradient are written to: those of these groups, or all."""
        torch.autograd.graph.increment_version([row.owner for row in self._rows if _is_written(row, groups)])


class CountedGradients:
    """Addresses of the gradients whose squares this process adds up: 0 for those that others count."""

    def __init__(self, rows: Sequence[Row], inputs: Inputs) -> None:
        self._inputs, self._counted = inputs, [row.counted for row in rows]
        self._all = all(self._counted)
        self._addresses = array("Q")

    @property
    def at(self) -> int:
        """Where they lie in memory, one per row, until this is asked again."""
        if self._all:
            return self._inputs.gradients_at
        found = zip(self._inputs.gradients, self._counted, strict=True)
        self._addresses = array("Q", [address if counted else 0 for address, counted in found])
        return self._addresses.buffer_info()[0]


def address_of_gradient(row: Row) -> int:
    """The address of a row's gradient: 0 where there is none, another number where it has no elements."""
    grad = row.grad
    if grad is None:
        return 0
    return 1 if is_fake(grad) else grad.data_ptr() or int(grad.numel() == 0)


class CopyingStepper:
    """Makes every step on contiguous copies of the rows that need them, with a stepper of its own."""

    def __init__(
        self,
        rows: Sequence[Row],
        counters: Counters,
        inputs: Inputs,
        make: Callable[[Sequence[Row], Counters, Inputs], Stepper],
    ) -> None:
        self._rows, self._counters, self._inputs, self._make = rows, counters, inputs, make
        self._groups: Sequence[GroupStep] = ()
        self._scopes: Sequence[Scope] = ()
        self._active: Sequence[bool] = ()

    def assign(self, groups: Sequence[GroupStep], scopes: Sequence[Scope]) -> None:
        """Take new options."""
        self._groups, self._scopes = groups, scopes

    @torch.no_grad()
    def norm(self, signals: Signals) -> None:
        """Write the scopes' sums of squares."""
        _, stepper = self._on_copies()
        stepper.norm(signals)

    def update(self, signals: Signals) -> Made | None:
        """Decide, update and count."""
        return self._run(signals, lambda stepper: stepper.update(signals))

    def step(self, signals: Signals) -> Made | None:
        """Both stages in one."""
        return self._run(signals, lambda stepper: stepper.step(signals))

    def active(self) -> Sequence[bool]:
        """Per group whether its scope has made the last step."""
        return self._active

    def _on_copies(self) -> tuple[list[Row], Stepper]:
        if capturing(self._counters.k.device):
            raise RuntimeError(
                "the elements of a parameter, its gradient and its state do not lie in the same order: they "
                "are stepped on copies, which cannot become part of a CUDA graph. Make them contiguous "
                "before the capture"
            )
        ordered = [in_order(row) for row in self._rows]
        stepper = self._make(ordered, self._counters, StepInputs(ordered, self._inputs.rates))
        stepper.assign(self._groups, self._scopes)
        return ordered, stepper

    @torch.no_grad()
    def _run(self, signals: Signals, stage: Callable[[Stepper], Made | None]) -> Made | None:
        ordered, stepper = self._on_copies()
        made = stage(stepper)
        self._active = stepper.active()
        groups = signals.allowed_groups(self._groups)
        self._inputs.increment_versions(groups)
        for row, copy in zip(self._rows, ordered, strict=True):
            if _is_written(row, groups):
                for old, new in zip(row.written(), copy.written(), strict=True):
                    old.copy_(new)
        return made


def in_order(row: Row) -> Row:
    """The row, if its elements lie in the same order in all its tensors; else with contiguous copies."""
    updated = [row.param, *row.state.values()]
    tensors = updated if row.grad is None else [row.grad, *updated]
    # the memory of a negative view holds the opposite numbers
    if not any(map(Tensor.is_neg, tensors)):
        if all(map(Tensor.is_contiguous, tensors)):
            return row
        if len({x.stride() for x in tensors}) == 1 and _dense(row.param):
            return row
    # the moments' copies may be of the parameter's layout, but this happens once in a while at most
    param, *state = (x.detach().resolve_neg().contiguous() for x in updated)
    if row.grad is not None:
        param.grad = row.grad.detach().resolve_neg().contiguous()
    kept = dict(zip(row.names, state, strict=True))
    places = {"counted": row.counted, "place": row.place, "column": row.column}
    return Row.alone(row.group, param, kept, row.step, **places)


def _is_written(row: Row, groups: Sequence[bool] | None) -> bool:
    """Whether a step of these groups, or of all, may write to a row."""
    return row.grad is not None and (groups is None or groups[row.group])


def has_memory(row: Row) -> bool:
    """Whether every tensor's values are at its address: some subclasses keep them elsewhere."""
    tensors = row.written() if row.grad is None else [row.grad, *row.written()]
    return all(x.data_ptr() for x in tensors if x.numel())


def _dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
