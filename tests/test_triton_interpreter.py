"""Runs the tests of the Triton backend on the CPU, in a process of their own each.

Whether Triton compiles or interprets is settled when it is imported. By hand, with all tests of the shared
suites, which take many minutes: `TRITON_INTERPRET=1 pytest -k triton`.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]

# file -> which of its tests; of the shared suites those that show most in the least time
_SUITES = {
    "test_triton_math.py": "",
    "test_triton_schedule.py": "",
    "test_triton.py": "",
    "test_gpu_step.py": "",
    "test_gpu_graph.py": "",
    "test_gpu_switch.py": "",
    "test_amp.py": "triton and (independent or joint or overflows or propagate or stay_as)",
    "test_trajectory.py": "triton and (fp32_error or moments_are_those or of_zero)",
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter")
@pytest.mark.parametrize("file", _SUITES)
def test_in_the_interpreter(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{file}"]
    run = subprocess.run(
        [*command, "-k", _SUITES[file]],
        # tensors this small only lose by a second thread, most of all on a busy machine
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # no test at all is an error too
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
