"""Keeps torch.compile out of a function, at less cost per call than torch's own decorator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")

# in every torch since 2.0, and in none of its stubs
_eval_frame: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
_set_eval_frame = getattr(_eval_frame, "set_eval_frame", None)
_skip_code = getattr(_eval_frame, "skip_code", None)


def eager(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """As `torch._disable_dynamo`, which makes five nested calls and imports the compiler at the first.

    A small step takes 30 us, and those calls 1 to 5 of them, more when other code ran in between.
    """
    if _set_eval_frame is None or _skip_code is None:
        return torch._disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        compiling = _set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            _set_eval_frame(compiling)

    # neither inlined by who traces a caller, nor traced itself after the graph has been broken there
    marked: Any = call
    marked._torchdynamo_disable = True
    _skip_code(marked.__code__)
    return call
