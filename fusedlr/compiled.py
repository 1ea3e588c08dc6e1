"""The compiled module `fusedlr._cpu`, or why there is none. Imported by whoever calls into it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# first, so that its OpenMP runtime is the one that is loaded
import torch  # noqa: F401

cpu: Any = None
error: str | None = None
try:
    cpu = import_module("fusedlr._cpu")
except ImportError as missing:
    error = str(missing)
