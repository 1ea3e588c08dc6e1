"""The compiled module `fusedlr._cpu`, or why there is none. Imported by whoever calls into it."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

# first, so that its OpenMP runtime is the one that is loaded
import torch  # noqa: F401

from fusedlr.sources import digest

# not the wheel that pip may have kept from an installation without a compiler
_AGAIN = "install fusedlr again with pip's --force-reinstall --no-cache-dir --no-deps"

cpu: Any = None
error: str | None = None
try:
    cpu = import_module("fusedlr._cpu")
    # "" but in a checkout, whose sources may have moved on
    if digest(Path(__file__).parents[1] / "csrc") not in ("", getattr(cpu, "sources", None)):
        cpu, error = None, f"its sources have changed since it was built: {_AGAIN}"
except ModuleNotFoundError:
    _need = "it is untried on Windows" if sys.platform == "win32" else f"get a C++17 compiler, then {_AGAIN}"
    error = f"the C++ kernel was not built: {_need}"
except ImportError as _error:
    error = f"the C++ kernel does not load ({_error}): {_AGAIN}"
