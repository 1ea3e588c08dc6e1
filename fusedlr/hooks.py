"""The hooks and the profiler's range around a step, which torch would wrap around `Optimizer.step` itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

Closure = Callable[[], Any]


def wanted(optimizer: Optimizer) -> bool:
    """Whether a step has to be made within `around`: without hooks that costs as much as a small step."""
    return bool(
        torch.autograd._profiler_enabled()
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


@contextmanager
def around(optimizer: Optimizer, closure: Closure | None, only: Any) -> Iterator[tuple[Closure | None, Any]]:
    """Run the step hooks around a step, in a profiler range; gives the arguments of the step that they leave.

    Raises:
        RuntimeError: a pre-hook returns something else than None or `(args, kwargs)`.
    """
    with torch.autograd.profiler.record_function(f"Optimizer.step#{type(optimizer).__name__}.step"):
        args: tuple[Any, ...] = (optimizer,) if closure is None else (optimizer, closure)
        kwargs: dict[str, Any] = {} if only is None else {"only": only}
        before = torch_optimizer._global_optimizer_pre_hooks, optimizer._optimizer_step_pre_hooks
        for hook in chain.from_iterable(hooks.values() for hooks in before if hooks):
            result = hook(optimizer, args, kwargs)
            if result is None:
                continue
            if not (isinstance(result, tuple) and len(result) == 2):
                raise RuntimeError(f"a step pre-hook must return None or (args, kwargs), got {result!r}")
            args, kwargs = result
        yield args[1] if len(args) > 1 else kwargs.get("closure"), kwargs.get("only")
        # where torch's profilers put their mark
        optimizer._optimizer_step_code()
        after = optimizer._optimizer_step_post_hooks, torch_optimizer._global_optimizer_post_hooks
        for hook in chain.from_iterable(hooks.values() for hooks in after if hooks):
            hook(optimizer, args, kwargs)
