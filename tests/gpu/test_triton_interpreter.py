"""Runs what is for Triton's interpreter, in a process of its own.

Whether Triton compiles or interprets is settled when it is imported. The interpreter evaluates a function for
a hundred thousand values, or every step of a schedule, at once; what a step does the machine of ptx/ shows.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_FILES = ("test_triton_math.py", "test_triton_schedule.py", "test_triton.py")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    files = [f"tests/gpu/{file}" for file in _FILES]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpreter", *files],
        # tensors this small only lose by a second thread, most of all on a busy machine
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # no test at all is an error too
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
