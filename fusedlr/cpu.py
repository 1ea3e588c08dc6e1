"""The step in C++ for tensors on the CPU: packs rows into addresses and calls `fusedlr._cpu`.

`step_` has the signature and the meaning of `reference.step_`. What the compiled loops cannot read in place
(dtypes they have no code for, tensors without memory of their own) runs through the reference.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from itertools import chain
from operator import attrgetter, is_
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

# first, so that its OpenMP runtime is the one that is loaded
import torch
from torch import Tensor

from fusedlr import reference
from fusedlr.reference import Counters, GroupStep, Row, Signals, TensorMath
from fusedlr.schedule import SHAPES, Schedule
from fusedlr.sources import digest

# not the wheel that pip may have kept from an installation without a compiler
_AGAIN = "install fusedlr again with pip's --force-reinstall --no-cache-dir --no-deps"
_unusable: str | None = None
try:
    _cpu: Any = import_module("fusedlr._cpu")
    _best_isa = _cpu.isas()[0]
    # "" but in a checkout, whose sources may have moved on
    if digest(Path(__file__).parents[1] / "csrc") not in ("", getattr(_cpu, "sources", None)):
        _unusable = f"its sources have changed since it was built: {_AGAIN}"
except ModuleNotFoundError:
    _need = "it is untried on Windows" if sys.platform == "win32" else f"get a C++17 compiler, then {_AGAIN}"
    _unusable = f"the C++ kernel was not built: {_need}"
except ImportError as error:
    _unusable = f"the C++ kernel does not load ({error}): {_AGAIN}"

# the order of Type in csrc/cpu_kernel.h
_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_KINDS = {
    (p, p, moments, moments): (_TYPES.index(p), _TYPES.index(moments))
    for p in _TYPES
    for moments in (torch.float64, torch.float32, p)
}

_dtype = attrgetter("dtype")
_of_row = attrgetter("param", "grad", "exp_avg", "exp_avg_sq", "step")
_of_counters = attrgetter("k", "skipped", "skips_in_row", "lr", "grad_norm", "coef")
_of_group = attrgetter(
    "index",
    "lr",
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
    if _unusable is not None:
        return _unusable
    other = sorted({device.type for device in devices} - {"cpu"})
    return f"it does not run on {', '.join(other)}" if other else None


def isas() -> list[str]:
    """Instruction sets the kernel has been compiled for and this machine has, the best first."""
    return _cpu.isas()


def openmp() -> bool:
    """Whether the kernel was compiled with OpenMP; if not, it has one thread."""
    return _cpu.openmp


def isa() -> str:
    """The instruction set in use: the best one, or `FUSEDLR_CPU_ISA` for debugging."""
    return os.environ.get("FUSEDLR_CPU_ISA") or _best_isa


class _Columns:
    """The tensors of all rows by role, and their addresses.

    The host spends about 0.5 us per tensor here and in `_Packed.fits`, 0.2 ms for 448: any tensor may have
    been moved since the last step, so every address is asked for.
    """

    def __init__(self, rows: Sequence[Row], amsgrad: bool) -> None:
        columns: tuple[Sequence[Tensor], ...] = tuple(zip(*map(_of_row, rows), strict=True)) or ((),) * 5
        self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.steps = columns
        self.tops: Sequence[Tensor | None] = [row.max_exp_avg_sq for row in rows] if amsgrad else ()
        p, g, m, v, steps = (list(map(Tensor.data_ptr, column)) for column in columns)
        tops = [0 if top is None else top.data_ptr() for top in self.tops]
        self.addresses = p, g, m, v, tops, steps

    def kept(self) -> tuple[Sequence[Any], ...]:
        """The columns that hold the same objects in every step."""
        return self.params, self.exp_avgs, self.exp_avg_sqs, self.tops, self.steps

    def written(self) -> Iterable[Tensor]:
        """Every tensor that a step writes."""
        return chain(
            self.params,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.steps,
            (top for top in self.tops if top is not None),
        )

    def gradients_in_order(self) -> bool:
        """Whether the memory of every gradient is its values, one after the other."""
        return all(map(Tensor.is_contiguous, self.grads)) and not any(map(Tensor.is_neg, self.grads))

    def lack_memory(self) -> bool:
        """Whether a tensor keeps its values elsewhere, as tensors of some subclasses do."""
        p, g, m, v, *_ = self.addresses
        return any(0 in column for column in (p, g, m, v)) and any(
            x.numel() and not x.data_ptr() for x in chain(self.written(), self.grads)
        )


class _Packed:
    """What is kept of one optimizer from step to step: dtypes, sizes and pieces of work, hyperparameters."""

    def __init__(self) -> None:
        self.work: Any = None
        # what was packed, and where it was
        self.columns: tuple[Sequence[Any], ...] = ()
        self.addresses: tuple[list[int], ...] = ()
        self.dtypes: list[torch.dtype] = []
        self.sizes: list[int] = []
        self.groups: dict[int, tuple[tuple[Any, ...], Any]] = {}

    def fits(self, columns: _Columns) -> bool:
        """Whether these are the tensors that were packed, but for gradients as plain as those were."""
        return (
            self.work is not None
            and all(map(_same, self.columns, columns.kept()))
            # `.data =` and `set_` leave the object and change what it is
            and self.addresses == columns.addresses[2:]
            and _same(self.dtypes, list(map(_dtype, columns.params)))
            and _same(self.dtypes, list(map(_dtype, columns.grads)))
            and self.sizes == list(map(Tensor.numel, columns.params))
            and not columns.lack_memory()
            and all(map(Tensor.is_contiguous, columns.params))
            and columns.gradients_in_order()
        )

    def pack(self, columns: _Columns, keep: bool) -> bool:
        """Make the work of a step on these tensors; False if there is no loop for their dtypes."""
        self.work = None
        dtypes = (columns.params, columns.grads, columns.exp_avgs, columns.exp_avg_sqs)
        types = [_KINDS.get(key) for key in zip(*(map(_dtype, column) for column in dtypes), strict=True)]
        tops = zip(columns.tops, columns.exp_avg_sqs, strict=False)
        if (
            None in types
            or any(top is not None and top.dtype != v.dtype for top, v in tops)
            or any(step.dtype != torch.float32 for step in columns.steps)
        ):
            return False
        params, moments = [kind[0] for kind in types if kind], [kind[1] for kind in types if kind]
        self.sizes = list(map(Tensor.numel, columns.params))
        self.work = _cpu.Tensors(params, moments, self.sizes)
        # strong references: they are the optimizer's own, and go with the next step or the optimizer
        self.columns = columns.kept() if keep else ((None,),)
        self.addresses = columns.addresses[2:]
        self.dtypes = list(map(_dtype, columns.params))
        return True

    def group(self, group: GroupStep) -> Any:
        """The compiled module's view of a group, made anew when a value has changed."""
        values = _of_group(group)
        if isinstance(group.lr, Tensor):
            # a tensor changed in place would equal itself
            values = (values[0], group.lr.item(), *values[2:])
        before = self.groups.get(group.index)
        if before is None or before[0] != values:
            index, lr, peak, (b1, b2), *rest = values
            schedule = compiled(lr) if isinstance(lr, Schedule) else None
            rate = float(lr) if schedule is None else 0.0
            before = values, _cpu.Group(index, schedule, rate, peak, b1, b2, *rest)
            self.groups[group.index] = before
        return before[1]


# belongs to an optimizer for as long as its counters do
_packed: WeakKeyDictionary[TensorMath, _Packed] = WeakKeyDictionary()


@torch.no_grad()
def step_(groups: Sequence[GroupStep], counters: Counters, signals: Signals, *, joint: bool) -> None:
    """Make one optimizer step, in place: see `reference.step_`."""
    rows = ordered = [row for group in groups for row in group.rows]
    amsgrad = any(group.amsgrad for group in groups)
    columns = _Columns(rows, amsgrad)
    packed = _packed.get(counters.math)
    if packed is None:
        packed = _packed[counters.math] = _Packed()
    if not packed.fits(columns):
        ordered = [_in_order(row) for row in rows]
        copied = any(a is not b for a, b in zip(rows, ordered, strict=True))
        columns = _Columns(ordered, amsgrad) if copied else columns
        if counters.k.device.type != "cpu" or columns.lack_memory() or not packed.pack(columns, not copied):
            packed.work = None
            reference.step_(groups, counters, signals, joint=joint)
            return
    counts = [len(group.rows) for group in groups]
    used = _of_counters(counters)
    # autograd must know, so that a backward through values from before the step raises
    torch.autograd.graph.increment_version(chain(columns.written(), used))
    packed.work.step(
        isa(),
        *columns.addresses,
        list(map(packed.group, groups)),
        counts,
        list(map(Tensor.data_ptr, used)),
        None if signals.grad_scale is None else _number(signals.grad_scale),
        signals.found_inf is not None and _number(signals.found_inf) != 0,
        joint,
        torch.get_num_threads(),
    )
    if ordered is not rows:
        _copy_back(rows, ordered)


def compiled(schedule: Schedule, single: bool = False) -> Any:
    """The compiled module's view of a schedule, in double or single precision."""
    phases = [
        (p.begin, p.end, p.origin, p.from_, p.to, SHAPES.index(p.shape), p.shape_param)
        for p in schedule.phases
    ]
    return (_cpu.Schedule32 if single else _cpu.Schedule)(phases, schedule.table)


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _number(x: Tensor | float) -> float:
    return float(x.item() if isinstance(x, Tensor) else x)


def _in_order(row: Row) -> Row:
    """The row, if its tensors can be run through element by element; else contiguous copies where needed."""
    updated = [row.param, row.exp_avg, row.exp_avg_sq]
    if row.max_exp_avg_sq is not None:
        updated.append(row.max_exp_avg_sq)
    if not row.grad.is_neg():
        tensors = [row.grad, *updated]
        if all(map(Tensor.is_contiguous, tensors)):
            return row
        if len({x.stride() for x in tensors}) == 1 and _dense(row.param):
            return row
    grad = row.grad.resolve_neg().contiguous()
    # the moments' copies may be of the parameter's layout, but this happens once in a while at most
    p, m, v, *top = (x.detach().contiguous() for x in updated)
    return Row(p, grad, m, v, top[0] if top else None, row.step)


def _dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _copy_back(rows: Sequence[Row], ordered: Sequence[Row]) -> None:
    """Give the tensors that a contiguous copy stood in for their new values."""
    for row, copy in zip(rows, ordered, strict=True):
        if row is copy:
            continue
        for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            old, new = getattr(row, name), getattr(copy, name)
            if old is not None and old.data_ptr() != new.data_ptr():
                old.copy_(new)
