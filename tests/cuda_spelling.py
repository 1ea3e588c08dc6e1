"""The schedule and the bias corrections of the CUDA kernels on the host, for many steps at once."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import cuda_host
import numpy as np
from numpy.typing import NDArray

from fusedlr import Schedule
from fusedlr.tables import GROUP_FLOATS, GROUP_INTS, PHASE_FLOATS, log, pack_phases, split


class Spelling:
    """`csrc/cuda.cu` with the headers, or edits of them: file -> what it says, what the wrong one says.

    `round_sine`: as a GPU computes it, with a sine rounded to nearest (0), down (-1) or up (1).
    """

    def __init__(
        self, folder: Path, edit: tuple[str, str, str] | None = None, round_sine: int | None = None
    ) -> None:
        sources = folder / "csrc"
        shutil.copytree(cuda_host.CSRC, sources)
        edits = [edit] if edit else []
        if round_sine is not None:
            edits.append(("schedule.h", "#ifdef __CUDA_ARCH__", "#ifdef ROUND_SINE"))
        for name, right, wrong in edits:
            text = (sources / name).read_text()
            assert text.count(right) == 1, f"does not apply: {text.count(right)} times {right!r}"
            (sources / name).write_text(text.replace(right, wrong))
        defined = [f'-DKERNELS="{sources / "cuda.cu"}"', "-DFUSEDLR_TYPE=float", "-DFUSEDLR_NAME=f32"]
        defined += [] if round_sine is None else [f"-DROUND_SINE={round_sine}"]
        path = cuda_host.library(folder, cuda_host.TESTS / "cuda_spelling.cpp", defined)
        self._functions = ctypes.CDLL(str(path))

    def lr_at(self, schedule: Schedule, k: NDArray[np.int64], peak: float) -> NDArray[np.float32]:
        """Rates of many steps."""
        schedule = schedule.resolve(peak)
        phase_ints, phase_floats = pack_phases(schedule, position=3)
        phases = len(phase_floats) // len(PHASE_FLOATS)
        ints = np.array(_row(GROUP_INTS, last_phase=phases) + phase_ints, np.int64)
        floats = _row(GROUP_FLOATS, rate=peak) + phase_floats + [np.nan] * 3 + list(schedule.table)
        k, lr = np.ascontiguousarray(k), np.empty(len(k), np.float32)
        self._call("lr_of_steps", ints, np.array(floats, np.float32), phases, k, lr)
        return lr

    def corrections(self, beta: float, updates: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
        """1 - b**t as the first beta, and its root as the second; t is one more than the updates."""
        high, low = split(log(beta))
        row = _row(GROUP_FLOATS, log_b1_hi=high, log_b1_lo=low, log_b2_hi=high, log_b2_lo=low)
        bc1, root_bc2 = np.empty_like(updates), np.empty_like(updates)
        self._call("corrections", np.array(row, np.float32), updates, bc1, root_bc2)
        return bc1, root_bc2

    def _call(self, name: str, *arguments: NDArray | int) -> None:
        """A function of these, the last of which has as many elements as the function is to compute."""
        given = [x if isinstance(x, int) else ctypes.c_void_p(x.ctypes.data) for x in arguments]
        function = getattr(self._functions, name)
        function.restype = None
        function(*given, ctypes.c_int64(len(arguments[-1])))  # type: ignore[arg-type]


def _row(columns: tuple[str, ...], **values: float) -> list[float]:
    return [values.get(name, 0) for name in columns]
