"""Keeps torch.compile out of a function, at no cost per call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])

# no stub has them
_eval_frame: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
_PARTS = ("set_code_exec_strategy", "_FrameExecStrategy", "_FrameAction")
# whether this torch lets code be marked; if not, its own decorator does the same in five nested calls
MARKS = all(hasattr(_eval_frame, name) for name in _PARTS)


def eager(function: _F) -> _F:
    """As `torch._disable_dynamo`, which wraps the function and imports the compiler at the first call.

    What that costs, 2 us, is a tenth of a small step. Here the code itself is marked.
    """
    if not MARKS:
        return torch._disable_dynamo(function)  # type: ignore[return-value]
    skip = _eval_frame._FrameAction.SKIP
    # whoever traces a caller breaks the graph here; then neither this frame nor those it calls are traced
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    _eval_frame.set_code_exec_strategy(function.__code__, _eval_frame._FrameExecStrategy(skip, skip))
    return function
