"""Warnings that point at the line of the user's code, however deep in fusedlr and torch they are raised."""

from __future__ import annotations

import os
import sys
import warnings

import torch

_INSIDE = tuple(os.path.dirname(os.path.abspath(path)) + os.sep for path in (__file__, torch.__file__))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost frame outside of fusedlr and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
