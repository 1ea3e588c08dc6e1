"""Triton's spelling of the schedule as an evaluator for `schedule_parity`, and edited copies of the kernels.

Everything here runs in the interpreter: TRITON_INTERPRET=1 must be set before Triton is imported.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray

from fusedlr import Schedule
from fusedlr.backends.gpu.tables import pack_phases
from fusedlr.columns import PHASE_FLOATS, PHASE_INTS

# appended to the spelling: what a kernel does for one step, for many at once
_MANY_STEPS = '''

@triton.jit
def lr_of_steps(ints, floats, table, ks, peak, out, count, PHASES: tl.constexpr, LANES: tl.constexpr):
    """The rate at every step of a vector; every phase is evaluated, the last one begun is kept."""
    lanes = tl.arange(0, LANES)
    k = tl.load(ks + lanes, mask=lanes < count, other=0)
    value = tl.zeros([LANES], tl.float32)
    for j in range(PHASES):
        row = ints + j * PHASE_INTS
        begun = (k >= tl.load(row + BEGIN)) | (j == 0)
        value = tl.where(begun, level(row, floats + j * PHASE_FLOATS, table, k), value)
    tl.store(out + lanes, tl.load(peak) * value, mask=lanes < count)


@triton.jit
def lr_of_step(ints, floats, table, ks, peak, out, phases):
    """The rate at one step, by the kernels' own search for the phase."""
    i = tl.program_id(0)
    k = tl.load(ks + i)
    tl.store(out + i, tl.load(peak) * evaluate(ints, floats, table, phases - phases, phases, k))
'''

_count = itertools.count()


def load(module: ModuleType, folder: Path, edit: tuple[str, str] | None = None, more: str = "") -> ModuleType:
    """A module from its own source with one edit and an appendix; Triton reads sources from files."""
    source = inspect.getsource(module)
    if edit is not None:
        right, wrong = edit
        assert source.count(right) == 1, f"does not apply: {source.count(right)} times {right!r}"
        source = source.replace(right, wrong)
    # a name that conftest knows as ours, and that no cache of the interpreter has seen
    name = f"fusedlr.copy_{next(_count)}"
    path = folder / f"{name}.py"
    path.write_text(source + more)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


class Spelling:
    """`fusedlr.triton_schedule`, or a wrong edit of it."""

    def __init__(self, folder: Path, edit: tuple[str, str] | None = None) -> None:
        from fusedlr.backends.gpu import triton_schedule

        self._module = load(triton_schedule, folder, edit, _MANY_STEPS)

    def lr_at(self, schedule: Schedule, k: NDArray[np.int64], peak: float) -> NDArray[np.float32]:
        """Rates of many steps at once."""
        ints, floats, table, ks, peaks, out = _arguments(schedule, k, peak)
        lanes = 1 << (len(k) - 1).bit_length()
        self._module.lr_of_steps[(1,)](
            ints, floats, table, ks, peaks, out, len(k), PHASES=len(ints) // len(PHASE_INTS), LANES=lanes
        )
        return out.numpy()

    def lr_at_one(self, schedule: Schedule, k: NDArray[np.int64], peak: float) -> NDArray[np.float32]:
        """Rates of steps one by one, as a kernel asks for them."""
        ints, floats, table, ks, peaks, out = _arguments(schedule, k, peak)
        phases = len(floats) // len(PHASE_FLOATS)
        self._module.lr_of_step[(len(k),)](ints, floats, table, ks, peaks, out, phases)
        return out.numpy()


def _arguments(schedule: Schedule, k: NDArray[np.int64], peak: float) -> tuple[torch.Tensor, ...]:
    schedule = schedule.resolve(peak)
    ints, floats = pack_phases(schedule, position=3)
    table = torch.tensor([torch.nan] * 3 + list(schedule.table))
    return (
        torch.tensor(ints),
        torch.tensor(floats),
        table,
        torch.from_numpy(k),
        torch.tensor([peak]),
        torch.empty(len(k)),
    )
