"""Schedules from the names and objects other libraries use: transformers' `get_scheduler`, torch's `LRScheduler`."""

from __future__ import annotations

import copy
import difflib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fusedlr import schedule as s

# transformers' name -> (constructor, {its keyword: ours})
_HF = {
    "constant": (s.constant, {}),
    "constant_with_warmup": (s.constant_with_warmup, {}),
    "linear": (s.linear, {}),
    "cosine": (s.cosine, {"num_cycles": "num_cycles"}),
    "cosine_with_restarts": (s.cosine_with_restarts, {"num_cycles": "num_cycles"}),
    "polynomial": (s.polynomial, {"lr_end": "lr_end", "power": "power"}),
    "inverse_sqrt": (s.inverse_sqrt, {"timescale": "timescale"}),
    "cosine_with_min_lr": (
        s.cosine_with_min_lr,
        {"num_cycles": "num_cycles", "min_lr": "min_lr", "min_lr_rate": "min_lr_ratio"},
    ),
    "cosine_warmup_with_min_lr": (
        s.cosine_warmup_with_min_lr,
        {
            "num_cycles": "num_cycles",
            "min_lr": "min_lr",
            "min_lr_rate": "min_lr_ratio",
            "warmup_lr_rate": "warmup_lr_rate",
        },
    ),
    "warmup_stable_decay": (
        s.warmup_stable_decay,
        {
            "num_decay_steps": "decay_steps",
            "num_stable_steps": "stable_steps",
            "warmup_type": "warmup_type",
            "decay_type": "decay_type",
            "min_lr_ratio": "min_lr_ratio",
            "num_cycles": "num_cycles",
        },
    ),
}
_METRIC_DRIVEN = ("reduce_lr_on_plateau", "greedy")
# transformers drops extra arguments for these without a word; so do we, for scripts that pass them
_IGNORES_EXTRAS = ("constant", "constant_with_warmup")


def from_hf(
    name: str,
    num_warmup_steps: float | None = None,
    num_training_steps: int | None = None,
    lr: float | None = None,
    **scheduler_specific_kwargs: Any,
) -> s.Schedule:
    """The schedule that `transformers.get_scheduler` builds from the same names and arguments.

    Equal to transformers for every update of the run; past its end the last value holds, where
    transformers' cosine climbs again.

    Args:
        name: a `SchedulerType` or its name, such as `cosine`.
        num_warmup_steps: updates of warm-up; below 1 a share of the run.
        num_training_steps: updates in the run.
        lr: peak learning rate, to resolve absolute levels (`min_lr`, `lr_end`) at once.
        **scheduler_specific_kwargs: as `get_scheduler` takes, such as `num_cycles` or `min_lr_rate`.

    Raises:
        ValueError: the name is unknown or driven by a metric, or an argument is missing or out of range.

    >>> from_hf("cosine", num_warmup_steps=200, num_training_steps=4000)
    cosine(warmup_steps=200, total_steps=4000)
    """
    name = getattr(name, "value", name)
    if name in _METRIC_DRIVEN:
        raise ValueError(
            f"name={name!r} follows a metric, not the step: use FusedAdamW(schedule=None) with that scheduler"
        )
    if name not in _HF:
        close = difflib.get_close_matches(str(name), _HF, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(_HF)}"
        raise ValueError(f"name={name!r} is not a schedule of transformers: {hint}")
    constructor, renamed = _HF[name]
    parameters = inspect.signature(constructor).parameters
    arguments: dict[str, Any] = {}
    if "warmup_steps" in parameters:
        if num_warmup_steps is None:
            raise ValueError(f"name={name!r} needs num_warmup_steps")
        arguments["warmup_steps"] = num_warmup_steps
    if "total_steps" in parameters:
        arguments["total_steps"] = num_training_steps
    for key, value in scheduler_specific_kwargs.items():
        if key in renamed:
            arguments[renamed[key]] = value
        elif name not in _IGNORES_EXTRAS:
            raise ValueError(
                f"{key}={value!r} is not an argument of name={name!r}, which takes {', '.join(renamed) or 'none'}"
            )
    schedule = constructor(**arguments)
    return schedule if lr is None else schedule.resolve(lr)


def _nested(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _nested(inner)


def _stand_in(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer with the same groups and rates over one dummy number each, for a scheduler to drive."""
    groups = []
    for group in optimizer.param_groups:
        rates = {k: float(group[k]) for k in ("lr", "initial_lr") if k in group}
        groups.append({"params": [torch.nn.Parameter(torch.zeros(()))], **rates})
    return torch.optim.SGD(groups, lr=0.0)


def from_torch(scheduler: LRScheduler, total_steps: int) -> s.Schedule:
    """Tabulate a fresh torch `LRScheduler` over `total_steps` updates. The scheduler itself is not stepped.

    The table holds ratios of each group's `initial_lr`: give `FusedAdamW` the same groups and rates.

    Args:
        scheduler: any `LRScheduler` that depends on the step alone.
        total_steps: updates in the run.

    Raises:
        TypeError: not a torch `LRScheduler`.
        ValueError: it follows a metric or also cycles momentum, has been stepped, or gives groups different
            ratios (build one schedule per group then).

    >>> optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0.1)
    >>> from_torch(torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5), total_steps=3)
    table([1.0, 0.5, 0.25])
    """
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"scheduler={scheduler!r} is not a torch LRScheduler")
    total = s._total("from_torch", total_steps)
    for inner in _nested(scheduler):
        if isinstance(inner, ReduceLROnPlateau):
            raise ValueError(
                f"scheduler={type(inner).__name__} follows a metric, not the step: it has no table"
            )
        if getattr(inner, "cycle_momentum", False):
            raise ValueError(
                f"scheduler={type(inner).__name__} also cycles momentum, which a learning rate schedule "
                "cannot: pass cycle_momentum=False"
            )
    if scheduler.last_epoch != 0:
        raise ValueError(f"scheduler has been stepped (last_epoch={scheduler.last_epoch}): pass a fresh one")
    optimizer = scheduler.optimizer
    stand_in = _stand_in(optimizer)
    # every reference to the user's optimizer becomes the stand-in; nothing of the model is copied
    driver = copy.deepcopy(scheduler, {id(optimizer): stand_in})
    peaks = [group["initial_lr"] for group in stand_in.param_groups]
    values: list[float] = []
    with warnings.catch_warnings():
        # the stand-in is never stepped, which torch would remark on
        warnings.simplefilter("ignore")
        for k in range(total):
            ratios = [
                float(group["lr"]) / peak if peak else 0.0
                for group, peak in zip(stand_in.param_groups, peaks, strict=True)
            ]
            if max(ratios) - min(ratios) > 1e-12 * max(ratios):
                raise ValueError(
                    f"scheduler gives groups different ratios of their peak at step {k}: {ratios}"
                )
            values.append(ratios[0])
            driver.step()
    return s.table(values)
