"""The step in C++ for tensors on the CPU: turns rows into addresses for `fusedlr._cpu`.

What the compiled loops cannot read in place (dtypes they have no code for, tensors without memory of their
own) runs through the reference.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fusedlr import reference
from fusedlr.backends import compiled
from fusedlr.backends.compiled import TYPES
from fusedlr.backends.order import CopyingStepper, CountedGradients, has_memory, in_order
from fusedlr.columns import STATE
from fusedlr.kept import MOMENTS
from fusedlr.reference import Counters, GroupStep, Inputs, Made, Row, Scope, Signals, Stepper
from fusedlr.schedule import SHAPES, Schedule, whole_and_rest


def why_not(devices: Iterable[torch.device]) -> str | None:
    """Why the C++ kernel cannot update tensors on these devices, or None if it can."""
    if compiled.cpu_error is not None:
        return compiled.cpu_error
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


def prepare(rows: Sequence[Row], counters: Counters, inputs: Inputs) -> Stepper:
    """A stepper for these rows: see `reference.Stepper`."""
    if counters.k.device.type != "cpu" or not all(map(_runs, rows)):
        return reference.ReferenceStepper(rows, counters, inputs)
    if not all(map(is_, rows, map(in_order, rows))):
        return CopyingStepper(rows, counters, inputs, CpuStepper)
    return CpuStepper(rows, counters, inputs)


class CpuStepper:
    """The compiled stages over rows that lie in order."""

    def __init__(self, rows: Sequence[Row], counters: Counters, inputs: Inputs) -> None:
        self._inputs, self._rows = inputs, rows
        self._counted = CountedGradients(rows, inputs)
        # kept, because the compiled stepper has their addresses
        self._counters = counters
        self._rates: list[tuple[int, Tensor]] = []
        self._given_rates = array("d")
        self._groups: Sequence[GroupStep] = ()
        self._scopes: Sequence[Scope] = ()
        self._last = Signals()
        states = [row.state for row in rows]
        self._compiled = compiled.cpu.Stepper(
            isa=isa(),
            group_of=[row.group for row in rows],
            params=[TYPES.index(row.param.dtype) for row in rows],
            state_types=[TYPES.index(state["exp_avg"].dtype) for state in states],
            sizes=[row.param.numel() for row in rows],
            p=[row.param.data_ptr() for row in rows],
            states=[[_address(state.get(name)) for state in states] for name in STATE],
            t=[row.step.data_ptr() for row in rows],
            groups=counters.k.numel(),
            counts=counters.counts.data_ptr(),
            used=counters.used.data_ptr(),
            squares=counters.squares.data_ptr(),
            places=[row.place for row in rows],
            columns=[row.column for row in rows],
            ring=None if counters.ring is None else counters.ring.layout(),
        )

    def assign(self, groups: Sequence[GroupStep], scopes: Sequence[Scope]) -> None:
        """Take new options."""
        self._groups, self._scopes = groups, scopes
        self._rates = [(i, group.lr) for i, group in enumerate(groups) if group.lr is not None]
        self._compiled.assign(
            [_group(group) for group in groups],
            list(map(_scope, scopes)),
        )

    def norm(self, signals: Signals) -> None:
        """Write the scopes' sums of squares."""
        self._run(compiled.cpu.NORM, self._counted.at, signals)

    def update(self, signals: Signals) -> Made:
        """Decide, update and count."""
        return self._written(compiled.cpu.UPDATE, signals)

    def step(self, signals: Signals) -> Made:
        """Both stages in one parallel region."""
        return self._written(compiled.cpu.NORM | compiled.cpu.UPDATE, signals)

    def active(self) -> list[bool]:
        """Per group whether its scope has made the last step."""
        active = reference.active_scopes(self._rows, self._groups, self._scopes, self._last)
        return [active[group.scope] for group in self._groups]

    def _written(self, stages: int, signals: Signals) -> Made:
        """Run stages that write to the parameters."""
        self._last = signals
        self._inputs.increment_versions(signals.allowed_groups(self._groups))
        return Made(*self._run(stages, self._inputs.gradients_at, signals))

    def _run(self, stages: int, gradients_at: int, signals: Signals) -> Any:
        """Run compiled stages with what is new in this step."""
        inputs, rates = self._inputs, self._inputs.rates_at
        if self._rates:
            # kept until the next step, because the stages are given its address
            self._given_rates = array("d", inputs.rates)
            for i, lr in self._rates:
                self._given_rates[i] = lr.item()
            rates = self._given_rates.buffer_info()[0]
        scale, inf, stepped, only = signals.grad_scale, signals.found_inf, signals.stepped, signals.only
        return self._compiled.run(
            stages,
            gradients_at,
            rates,
            None if scale is None else float(scale),
            inf is not None and float(inf) != 0,
            torch.get_num_threads(),
            None if stepped is None else [x != 0 for x in stepped.tolist()],
            only if only is None or isinstance(only, tuple) else [x != 0 for x in only.tolist()],
        )


def _group(group: GroupStep) -> Any:
    schedule = None if group.schedule is None else compiled_schedule(group.schedule)
    return compiled.cpu.Group(
        schedule, group.peak, *group.betas, group.eps, group.weight_decay, group.maximize, group.scope
    )


def _scope(scope: Scope) -> Any:
    fixed = scope.max_grad_norm, scope.skip_nonfinite, scope.always, scope.by_own_norm
    zclip = scope.zclip
    if zclip is None:
        return compiled.cpu.Scope(*fixed)
    return compiled.cpu.Scope(
        *fixed, zclip.warmup_steps, zclip.z_thresh, 1 - zclip.alpha, zclip.action == "skip"
    )


def compiled_schedule(schedule: Schedule, single: bool = False) -> Any:
    """The compiled module's view of a schedule, in double or single precision."""
    phases = [
        (p.begin, p.end, p.origin, p.from_, p.to, SHAPES.index(p.shape), *whole_and_rest(p))
        for p in schedule.phases
    ]
    return (compiled.cpu.Schedule32 if single else compiled.cpu.Schedule)(phases, schedule.table)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _runs(row: Row) -> bool:
    """Whether there is a loop for these dtypes, and memory for it to read: some subclasses have none.

    A moment has the parameter's dtype or is fp32 or fp64, a gradient has the parameter's: step.py sees to it.
    """
    moments = {x.dtype for name, x in row.state.items() if name in MOMENTS}
    return row.param.dtype in TYPES and len(moments) == 1 and has_memory(row)
