"""Rows that a kernel can run through element by element, and copies for those it cannot."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusedlr.reference import MOMENTS, Row


def in_order(row: Row) -> Row:
    """The row, if its elements lie in the same order in all its tensors; else with contiguous copies."""
    updated = [row.param, row.exp_avg, row.exp_avg_sq]
    if row.max_exp_avg_sq is not None:
        updated.append(row.max_exp_avg_sq)
    tensors = [row.grad, *updated]
    # the memory of a negative view holds the opposite numbers
    if not any(map(Tensor.is_neg, tensors)):
        if all(map(Tensor.is_contiguous, tensors)):
            return row
        if len({x.stride() for x in tensors}) == 1 and _dense(row.param):
            return row
    # the moments' copies may be of the parameter's layout, but this happens once in a while at most
    grad, p, m, v, *top = (x.detach().resolve_neg().contiguous() for x in tensors)
    return Row(p, grad, m, v, top[0] if top else None, row.step)


def copy_back(rows: Sequence[Row], ordered: Sequence[Row]) -> None:
    """Give the tensors that a copy of `in_order` stood in for their new values."""
    for row, copy in zip(rows, ordered, strict=True):
        if row is copy:
            continue
        for name in ("param", *MOMENTS):
            old, new = getattr(row, name), getattr(copy, name)
            if old is not None and old.data_ptr() != new.data_ptr():
                old.copy_(new)


def has_memory(row: Row) -> bool:
    """Whether every tensor's values are at its address: some subclasses keep them elsewhere."""
    return all(x.data_ptr() for x in (row.grad, *row.written()) if x.numel())


def _dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
