"""The compiled modules `fusedlr._host`, `_cpu` and `_cuda`, or why there is none.

Imported by whoever calls into them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

# first, so that its OpenMP runtime is the one that is loaded
import torch

from fusedlr.sources import digest

# the order of Type in csrc/types.h
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# not the wheel that pip may have kept from an installation without a compiler
_AGAIN = "install fusedlr again with pip's --force-reinstall --no-cache-dir --no-deps"
_NEED = "it is untried on Windows" if sys.platform == "win32" else None


def _load(name: str, kernel: str, compiler: str) -> tuple[Any, str | None]:
    """The module, or why it is not there."""
    try:
        module = import_module(f"fusedlr.{name}")
    except ModuleNotFoundError:
        return None, f"the {kernel} was not built: {_NEED or f'get {compiler}, then {_AGAIN}'}"
    except ImportError as error:
        return None, f"the {kernel} does not load ({error}): {_AGAIN}"
    # "" but in a checkout, whose sources may have moved on
    if digest(Path(__file__).parents[2]) not in ("", getattr(module, "sources", None)):
        return None, f"its sources have changed since it was built: {_AGAIN}"
    return module, None


host, host_error = _load("_host", "compiled watch", "a C++17 compiler")
cpu, cpu_error = _load("_cpu", "C++ kernel", "a C++17 compiler")
cuda, cuda_error = _load("_cuda", "launcher of the CUDA kernels", "a C++17 compiler")
