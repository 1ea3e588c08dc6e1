"""What the backends for GPUs share: which tensors their kernels can update, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import is_

import torch

from fusedlr.backends.order import CopyingStepper, has_memory, in_order
from fusedlr.kept import MOMENTS
from fusedlr.reference import Counters, Inputs, ReferenceStepper, Row, Stepper, scalar_dtype

# dtypes of a parameter and of its moments
_KINDS = {
    (p, moments) for p in (torch.float32, torch.bfloat16, torch.float16) for moments in {torch.float32, p}
}


def why_not(devices: Iterable[torch.device], of: Callable[[torch.device], str | None]) -> str | None:
    """Why a backend cannot update tensors on these devices, or None; `of` tells for a single one."""
    devices = set(devices)
    if not devices:
        return "there is no tensor that could be on its device"
    if len(devices) > 1:
        return "it does not run on several devices at once"
    return next(filter(None, map(of, devices)), None)


def prepare(
    rows: Sequence[Row],
    counters: Counters,
    inputs: Inputs,
    make: Callable[[Sequence[Row], Counters, Inputs], Stepper],
) -> Stepper:
    """A stepper for these rows, made by `make` where the kernels can read all of them in place."""
    device = counters.k.device
    if not all(_runs(row, device) for row in rows):
        if counters.graphs is not None:
            counters.graphs.outdate()
        # a sum over fp64 gradients must not lose digits between the stages
        counters.squares = counters.squares.to(scalar_dtype(device))
        return ReferenceStepper(rows, counters, inputs)
    counters.use_fp32()
    if not all(map(is_, rows, map(in_order, rows))):
        return CopyingStepper(rows, counters, inputs, make)
    return make(rows, counters, inputs)


def _runs(row: Row, device: torch.device) -> bool:
    """Whether there is a kernel for these dtypes, and memory on this device for it to read."""
    dtypes = {x.dtype for name, x in row.state.items() if name in MOMENTS}
    return (
        len(dtypes) == 1
        and (row.param.dtype, *dtypes) in _KINDS
        and row.step.dtype == torch.float32
        and all(x.device == device for x in row.written())
        and has_memory(row)
    )
