"""The schedule and bias corrections as NVRTC compiles them, at many steps, on the machine of ptx/."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from ptx import driver

from fusedlr import Schedule
from fusedlr.backends.gpu import kernels
from fusedlr.backends.gpu.tables import log, pack_phases, split
from fusedlr.columns import GROUP_FLOATS, GROUP_INTS, PHASE_FLOATS
from gpu import cuda_compile

# where csrc/cuda/step.cu goes on to what threads do with a chunk
_END = "// one chunk\n"
_ARCH, _THREADS = 90, 128


class Spelling:
    """`csrc/cuda/step.cu` with the headers, or an edit of them: file, what it says, what the wrong one says.

    `approx`: what instructions return whose last bits PTX leaves open, see machine/state.h.
    """

    def __init__(self, folder: Path, edit: tuple[str, str, str] | None = None) -> None:
        sources = folder / "csrc"
        shutil.copytree(kernels.csrc(), sources)
        if edit is not None:
            name, right, wrong = edit
            text = (sources / name).read_text()
            assert text.count(right) == 1, f"does not apply: {text.count(right)} times {right!r}"
            (sources / name).write_text(text.replace(right, wrong))
        text, headers = kernels.sources(sources)
        above, end, _ = text.partition(_END)
        assert end, f"{_END!r} is not in step.cu"
        own = Path(__file__).with_suffix(".cu").read_text()
        compiled = cuda_compile.nvrtc().compile(above + own, f"compute_{_ARCH}", (), headers, kernels.OPTIONS)
        self._text = compiled.image.decode()
        self.approx = 0

    def lr_at(self, schedule: Schedule, k: NDArray[np.int64], peak: float) -> NDArray[np.float32]:
        """Rates of many steps."""
        schedule = schedule.resolve(peak)
        phase_ints, phase_floats = pack_phases(schedule, position=3)
        phases = len(phase_floats) // len(PHASE_FLOATS)
        ints = np.array(_row(GROUP_INTS, last_phase=phases) + phase_ints, np.int64)
        floats = _row(GROUP_FLOATS, peak=peak) + phase_floats + [np.nan] * 3 + list(schedule.table)
        lr = np.empty(len(k), np.float32)
        self._launch("lr_of_steps", ints, np.array(floats, np.float32), phases, np.ascontiguousarray(k), lr)
        return lr

    def corrections(self, beta: float, updates: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
        """1 - b**t as the first beta, and its root as the second; t is one more than the updates."""
        high, low = split(log(beta))
        row = _row(GROUP_FLOATS, log_b1_hi=high, log_b1_lo=low, log_b2_hi=high, log_b2_lo=low)
        bc1, root_bc2 = np.empty_like(updates), np.empty_like(updates)
        self._launch("corrections", np.array(row, np.float32), updates, bc1, root_bc2)
        return bc1, root_bc2

    def _launch(self, name: str, *arguments: NDArray | int) -> None:
        """A kernel of these and of how many elements the last of them has, all of 8 bytes."""
        machine = driver.installed().machine
        # modules share the names of these kernels
        machine.activate(self._text)
        machine.order("straight", approx=self.approx, races=False)
        last = arguments[-1]
        assert isinstance(last, np.ndarray)
        numbers = [x if isinstance(x, int) else x.ctypes.data for x in (*arguments, len(last))]
        machine.launch(name, -(-len(last) // _THREADS), _THREADS, struct.pack(f"<{len(numbers)}q", *numbers))
        machine.order("straight", races=False)


def _row(columns: tuple[str, ...], **values: float) -> list[float]:
    return [values.get(name, 0) for name in columns]
