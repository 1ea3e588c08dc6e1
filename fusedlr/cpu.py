"""The step in C++ for tensors on the CPU: packs rows into addresses and calls `fusedlr._cpu`.

`step_` has the signature and the meaning of `reference.step_`. What the compiled loops cannot read in place
(dtypes they have no code for, tensors without memory of their own) runs through the reference.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from fusedlr import compiled, reference
from fusedlr.compiled import TYPES
from fusedlr.order import copy_back, has_memory, in_order
from fusedlr.plan import Pack, pack_of
from fusedlr.reference import Counters, GroupStep, Row, Signals
from fusedlr.schedule import SHAPES, Schedule
from fusedlr.tables import whole_and_rest

_KINDS = {
    (p, p, moments, moments): (TYPES.index(p), TYPES.index(moments))
    for p in TYPES
    for moments in (torch.float64, torch.float32, p)
}

_dtypes = attrgetter("param.dtype", "grad.dtype", "exp_avg.dtype", "exp_avg_sq.dtype")
_of_group = attrgetter(
    "index",
    "peak",
    "betas",
    "eps",
    "weight_decay",
    "maximize",
    "max_grad_norm",
    "skip_nonfinite",
    "advance",
)


def why_not(devices: Iterable[torch.device]) -> str | None:
    """Why the C++ kernel cannot update tensors on these devices, or None if it can."""
    if compiled.error is not None:
        return compiled.error
    other = sorted({device.type for device in devices} - {"cpu"})
    return f"it does not run on {', '.join(other)}" if other else None


def isas() -> list[str]:
    """Instruction sets the kernel has been compiled for and this machine has, the best first."""
    return compiled.cpu.isas()


def openmp() -> bool:
    """Whether the kernel was compiled with OpenMP; if not, it has one thread."""
    return compiled.cpu.openmp


def isa() -> str:
    """The instruction set in use: the best one, or `FUSEDLR_CPU_ISA` for debugging."""
    return os.environ.get("FUSEDLR_CPU_ISA") or isas()[0]


class _Kernel:
    """The compiled loops over the tensors of a pack, and the numbers they take beside: one per pack."""

    def __init__(self, rows: Sequence[Row], kinds: Sequence[tuple[int, int]]) -> None:
        params, moments = [kind[0] for kind in kinds], [kind[1] for kind in kinds]
        p, g, m, v, steps = (
            [getattr(row, name).data_ptr() for row in rows]
            for name in ("param", "grad", "exp_avg", "exp_avg_sq", "step")
        )
        largest = [row.max_exp_avg_sq for row in rows]
        tops = [0 if top is None else top.data_ptr() for top in largest]
        sizes = [row.param.numel() for row in rows]
        self.gradients = g
        tops = tops if any(tops) else []
        self._tensors = compiled.cpu.Tensors(params, moments, sizes, p, m, v, tops, steps)
        self._loops = compiled.cpu.kernel(isa())
        self._groups: tuple[GroupStep, ...] | None = None
        self._counters: Counters | None = None

    def step_(
        self, gradients: Any, groups: Sequence[GroupStep], counters: Counters, signals: Signals, joint: bool
    ) -> tuple[list[int], list[int], list[float]]:
        """`gradients`: a watch that has noted their addresses, or the addresses."""
        if counters is not self._counters:
            self._counters = counters
            self._table = compiled.cpu.CounterTable(
                counters.counts.data_ptr(), counters.used.data_ptr(), counters.k.numel()
            )
        before = self._groups
        if before is None or len(groups) != len(before) or not all(map(is_, groups, before)):
            self._compile(groups)
        scale, inf = signals.grad_scale, signals.found_inf
        return self._tensors.step(
            gradients,
            self._loops,
            self._compiled,
            self._counts,
            self._table,
            None if scale is None else _number(scale),
            inf is not None and _number(inf) != 0,
            joint,
            torch.get_num_threads(),
        )

    def repeat(self, param_groups: list[dict[str, Any]], watch: Any, joint: bool) -> Any:
        """The last step again, as one call: see `repeat`."""
        rest = self._loops, self._compiled, self._counts, self._table, joint
        return compiled.cpu.Repeat(param_groups, watch, self._tensors, *rest)

    def _compile(self, groups: Sequence[GroupStep]) -> None:
        # a tensor may change in place, so what was made of it is not kept
        kept = not any(isinstance(group.lr, Tensor) for group in groups)
        self._groups = tuple(groups) if kept else None
        self._compiled = list(map(_compiled_group, groups))
        self._counts = [len(group.rows) for group in groups]


def _compiled_group(group: GroupStep) -> Any:
    schedule = compiled_schedule(group.lr) if isinstance(group.lr, Schedule) else None
    lr = 0.0 if isinstance(group.lr, Schedule) else _number(group.lr)
    index, peak, (b1, b2), *rest = _of_group(group)
    return compiled.cpu.Group(index, schedule, lr, peak, b1, b2, *rest)


def step_(
    groups: Sequence[GroupStep], counters: Counters, signals: Signals, *, joint: bool
) -> tuple[list[int], list[int], list[float]] | None:
    """Make one optimizer step, in place: see `reference.step_`."""
    pack = pack_of(groups)
    if pack.kernel is not None:
        return pack.kernel.step_(pack.watch, groups, counters, signals, joint)
    return _first_step_(pack, groups, counters, signals, joint)


def repeat(groups: Sequence[GroupStep], param_groups: list[dict[str, Any]], *, joint: bool) -> Any:
    """What makes the step just made again, where only gradients and given rates have changed; None if none.

    It is called with `(param_groups, state, threads)`, and returns what `step_` does, or None where more has
    changed: nothing has been done then. A scaler's signals are not for it.
    """
    pack = pack_of(groups)
    if pack.kernel is None or any(isinstance(group.lr, Tensor) for group in groups):
        return None
    return pack.kernel.repeat(param_groups, pack.watch, joint)


@torch.no_grad()
def _first_step_(
    pack: Pack, groups: Sequence[GroupStep], counters: Counters, signals: Signals, joint: bool
) -> tuple[list[int], list[int], list[float]] | None:
    """The step that packs; every step is one where tensors have to be copied or cannot be watched."""
    rows = list(chain.from_iterable(group.rows for group in groups))
    ordered = list(map(in_order, rows))
    kinds = [_KINDS.get(_dtypes(row)) for row in ordered]
    if counters.k.device.type != "cpu" or not all(map(_runs, ordered, kinds)):
        return reference.step_(groups, counters, signals, joint=joint)
    kernel = _Kernel(ordered, [kind for kind in kinds if kind])
    torch.autograd.graph.increment_version(chain.from_iterable(row.written() for row in rows))
    read = kernel.step_(kernel.gradients, groups, counters, signals, joint)
    if all(map(is_, rows, ordered)):
        pack.kernel = kernel if pack.watch is not None else None
    else:
        copy_back(rows, ordered)
    return read


def compiled_schedule(schedule: Schedule, single: bool = False) -> Any:
    """The compiled module's view of a schedule, in double or single precision."""
    phases = [
        (p.begin, p.end, p.origin, p.from_, p.to, SHAPES.index(p.shape), *whole_and_rest(p))
        for p in schedule.phases
    ]
    return (compiled.cpu.Schedule32 if single else compiled.cpu.Schedule)(phases, schedule.table)


def _runs(row: Row, kind: tuple[int, int] | None) -> bool:
    """Whether there is a loop for these dtypes, and memory for it to read: some subclasses have none."""
    largest = row.max_exp_avg_sq
    if kind is None or row.step.dtype != torch.float32:
        return False
    if largest is not None and largest.dtype != row.exp_avg_sq.dtype:
        return False
    return has_memory(row)


def _number(x: Tensor | float) -> float:
    return float(x.item() if isinstance(x, Tensor) else x)
