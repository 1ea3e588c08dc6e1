"""What trainers and loops log of a run beside loss and rate, under which names, and the recording at its end.

`fusedlr.hf` and `fusedlr.integrations.lightning` hand it to the loggers of their tools.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from fusedlr.groups import ScopeKey
from fusedlr.optimizer import FusedAdamW
from fusedlr.warn import warn

# the file in the folder of a run
RECORDING = "record.npz"


def scalars(optimizer: FusedAdamW) -> dict[str, float]:
    """The last step in numbers for a logger such as TensorBoard's; never waits for a GPU.

    Returns:
        `grad_norm`, where one was needed; `skipped_steps`, once a step has been skipped; and of an optimizer
        with `record=Record(tensors=True)` `update_ratio/lora_A` and so on, as `last_update_ratios` has them.
        Where there are several scopes, `grad_norm/first` and `skipped_steps/first` of each; that of groups
        without a scope is `unnamed`, or `unnamed_` where a scope is called so.

    >>> import torch, fusedlr
    >>> p = torch.nn.Parameter(torch.full((2, 2), 2.0))
    >>> optimizer = fusedlr.FusedAdamW(
    ...     [p], lr=0.5, weight_decay=0, max_grad_norm=1.0, record=fusedlr.Record()
    ... )
    >>> p.grad = torch.ones(2, 2)
    >>> optimizer.step()
    >>> {name: round(value, 3) for name, value in scalars(optimizer).items()}
    {'grad_norm': 2.0, 'update_ratio/matrices': 0.25}
    """
    used = optimizer.last_metrics()
    found: dict[str, float] = {}
    for name, key in (("grad_norm", "grad_norm"), ("skipped_steps", "skipped")):
        for of, value in _by_scope(used, key):
            # no norm was needed, or nothing was skipped
            if not math.isnan(value) and (value or name == "grad_norm"):
                found[f"{name}/{of}" if of else name] = value
    ratios = optimizer.last_update_ratios()
    return {**found, **{f"update_ratio/{kind}": ratio for kind, ratio in ratios.items()}}


def _by_scope(used: dict[str, Any], key: str) -> list[tuple[str, Any]]:
    """What a scope is called in a logger, empty where it is the only one, and its value."""
    if not isinstance(used[key], list):
        return [("", used[key])]
    given = {scope for scope in used["scopes"] if isinstance(scope, str)}
    return [(_called(scope, given), value) for scope, value in zip(used["scopes"], used[key], strict=True)]


def _called(scope: ScopeKey, given: set[str]) -> str:
    """What one scope is called: by its name, or else not as one of those whose names were `given`."""
    if isinstance(scope, str):
        return scope
    name = "unnamed" if scope is None else str(scope)
    while name in given:
        # loggers replace most other characters
        name += "_"
    return name


class Nonfinite:
    """Warns of each tensor once that is the first whose gradient is inf or nan in a skipped step."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, optimizer: FusedAdamW) -> None:
        """Warn if the last copy that has reached the host names a new one."""
        used = optimizer.last_metrics()
        steps = dict(_by_scope(used, "nonfinite_step"))
        for of, tensor in _by_scope(used, "nonfinite_tensor"):
            if tensor is not None and tensor not in self._told:
                self._told.add(tensor)
                warn(f"step {steps[of]} was skipped: the gradient of {tensor} was inf or nan")


def write_recording(optimizer: FusedAdamW, folder: str | os.PathLike[str], *, writes: bool = True) -> None:
    """Write what the optimizer has recorded, if it does, to `record.npz` in a folder, for `fusedlr report`.

    Where tensors are spread over processes every process calls it, and one of them `writes`. A file that
    cannot be written ends in a warning, as the run behind it is worth more.
    """
    if optimizer.recorded is None or not optimizer.param_groups:
        return
    recording = optimizer.record()
    if not writes or not len(recording["step"]):
        return
    path = Path(folder) / RECORDING
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recording.save(path)
    except OSError as error:
        warn(f"the recording of this run could not be written to {path}: {error.strerror}")


__all__ = ["RECORDING", "Nonfinite", "scalars", "write_recording"]
