"""Schedules from what other libraries use: the names of transformers, the schedulers of torch."""

from __future__ import annotations

import copy
import difflib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from numbers import Real
from types import MethodType
from typing import TYPE_CHECKING, Any

from fusedlr import arguments
from fusedlr.schedule import constructors as ours
from fusedlr.schedule import fractional
from fusedlr.schedule.schedule import Schedule

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

# transformers' name of a schedule -> (constructor, {transformers' keyword: the constructor's})
TRANSFORMERS: dict[str, tuple[Callable[..., Schedule], dict[str, str]]] = {
    "constant": (ours.constant, {}),
    "constant_with_warmup": (ours.constant_with_warmup, {}),
    "linear": (ours.linear, {}),
    "cosine": (ours.cosine, {"num_cycles": "num_cycles"}),
    "cosine_with_restarts": (ours.cosine_with_restarts, {"num_cycles": "num_cycles"}),
    "polynomial": (ours.polynomial, {"lr_end": "lr_end", "power": "power"}),
    "inverse_sqrt": (ours.inverse_sqrt, {"timescale": "timescale"}),
    "cosine_with_min_lr": (
        ours.cosine_with_min_lr,
        {"num_cycles": "num_cycles", "min_lr": "min_lr", "min_lr_rate": "min_lr_ratio"},
    ),
    "cosine_warmup_with_min_lr": (
        ours.cosine_warmup_with_min_lr,
        {
            "num_cycles": "num_cycles",
            "min_lr": "min_lr",
            "min_lr_rate": "min_lr_ratio",
            "warmup_lr_rate": "warmup_lr_rate",
        },
    ),
    "warmup_stable_decay": (
        ours.warmup_stable_decay,
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
# transformers ignores extra arguments of these without a warning, and so does `from_hf`: scripts pass some
_IGNORES_EXTRAS = ("constant", "constant_with_warmup")


def from_hf(
    name: str,
    num_warmup_steps: float | None = None,
    num_training_steps: int | None = None,
    lr: float | None = None,
    **scheduler_specific_kwargs: Any,
) -> Schedule:
    """The schedule that `transformers.get_scheduler` builds from the same names and arguments.

    Equal to transformers for every update of the run; past its end the last value holds, where
    transformers' cosine climbs again.

    Args:
        name: a `SchedulerType` or its name, such as `cosine`.
        num_warmup_steps: updates of warm-up. This and every other count may be a fraction, which is no share
            of the run: 0.5 is half an update.
        num_training_steps: updates in the run.
        lr: peak learning rate, to resolve absolute levels (`min_lr`, `lr_end`) at once.
        **scheduler_specific_kwargs: as `get_scheduler` takes, such as `num_cycles` or `min_lr_rate`.

    Raises:
        ValueError: the name is unknown or driven by a metric, or an argument is missing or out of range.

    >>> from_hf("cosine", num_warmup_steps=200, num_training_steps=4000)
    cosine(warmup_steps=200, total_steps=4000)
    """
    name = getattr(name, "value", name)
    if not isinstance(name, str):
        raise ValueError(f"name={arguments.shown(name)} is not a schedule of transformers: expected a name")
    if name in _METRIC_DRIVEN:
        raise ValueError(
            f"name={name!r} follows a metric, not the step: use FusedAdamW(schedule=None) with that scheduler"
        )
    if name not in TRANSFORMERS:
        close = difflib.get_close_matches(str(name), TRANSFORMERS, n=3, cutoff=0.3)
        hint = (
            f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(TRANSFORMERS)}"
        )
        raise ValueError(f"name={name!r} is not a schedule of transformers: {hint}")
    constructor, renamed = TRANSFORMERS[name]
    parameters = inspect.signature(constructor).parameters
    given: dict[str, Any] = {}
    if "warmup_steps" in parameters:
        if num_warmup_steps is None:
            raise ValueError(f"name={name!r} needs num_warmup_steps")
        given["warmup_steps"] = num_warmup_steps
    if "total_steps" in parameters:
        given["total_steps"] = num_training_steps
    # a schedule's own arguments come in a dict of this name (get_scheduler) or one by one (TrainingArguments)
    extras = scheduler_specific_kwargs.pop("scheduler_specific_kwargs", None)
    extras = {} if extras is None else extras
    if not isinstance(extras, Mapping):
        raise ValueError(f"scheduler_specific_kwargs={arguments.shown(extras)} is not a dict")
    for key, value in {**extras, **scheduler_specific_kwargs}.items():
        if key in renamed:
            given[renamed[key]] = value
        elif name not in _IGNORES_EXTRAS:
            known = ", ".join(renamed) or "none"
            shown = arguments.shown(value)
            raise ValueError(f"{key}={shown} is not an argument of name={name!r}, which takes {known}")
    # the peak of a schedule without absolute levels is checked too
    peak = None if lr is None else arguments.non_negative("lr", lr)
    if fractional.has_fractions(given):
        theirs = {"warmup_steps": "num_warmup_steps", "total_steps": "num_training_steps"}
        theirs.update((own, key) for key, own in renamed.items())
        written = [f"{theirs[own]}={value!r}" for own, value in given.items() if value is not None]
        schedule = fractional.build(constructor, given, f"from_hf({', '.join([repr(name), *written])})")
    else:
        # a whole number below 1 is 0, so no count is taken for a share of the run
        schedule = constructor(**given)
    return schedule if peak is None else schedule.resolve(peak)


def knows_hf(name: str) -> bool:
    """Whether `from_hf` has this schedule: it has none that follows a metric or is newer than this package.

    >>> knows_hf("cosine"), knows_hf("reduce_lr_on_plateau")
    (True, False)
    """
    name = getattr(name, "value", name)
    return isinstance(name, str) and name in TRANSFORMERS


def from_torch(scheduler: LRScheduler, total_steps: int) -> Schedule:
    """Tabulate a fresh torch `LRScheduler` over `total_steps` updates. The scheduler itself is not stepped.

    The table holds ratios of each group's peak. That is its `initial_lr`, so give `FusedAdamW` the same
    groups and rates; `OneCycleLR` and `CyclicLR` bring rates of their own: there it is `max_lr`.

    Args:
        scheduler: any `LRScheduler` that depends on the step alone.
        total_steps: updates in the run.

    Raises:
        TypeError: not a torch `LRScheduler`.
        ValueError: it follows a metric, also cycles momentum, has been stepped, has no peak above 0, or gives
            groups different ratios (build one schedule per group then).

    >>> import torch
    >>> optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0.1)
    >>> from_torch(torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5), total_steps=3)
    table([1.0, 0.5, 0.25])
    """
    import torch

    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise TypeError(f"scheduler={arguments.shown(scheduler)} is not a torch LRScheduler")
    total = ours.table_length("from_torch", total_steps)
    for inner in _nested(scheduler):
        _refuse(inner)
    _refuse_stepped(scheduler)
    driver = _copy(scheduler)
    groups = driver.optimizer.param_groups
    peaks = _peaks(driver)
    # a group whose peak is 0 has rate 0 under any schedule, and no ratio
    live = [i for i, peak in enumerate(peaks) if peak > 0]
    if not live:
        raise ValueError(f"the scheduler's rates are all 0, the peak of every group is {peaks}")
    values: list[float] = []
    with warnings.catch_warnings():
        # the stand-in takes no steps, and torch warns of schedulers that step before their optimizer
        warnings.simplefilter("ignore")
        for k in range(total):
            ratios = [float(groups[i]["lr"]) / peaks[i] for i in live]
            if max(ratios) - min(ratios) > 1e-12 * max(ratios):
                raise ValueError(
                    f"scheduler gives groups different ratios of their peak at step {k}: {ratios}; "
                    "build one schedule per group"
                )
            values.append(ratios[0])
            if k + 1 < total:
                _step(driver, k)
    return ours.table(values)


def _nested(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _nested(inner)


def _refuse(scheduler: LRScheduler) -> None:
    """Raise for a scheduler that no table can replace."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau

    name = type(scheduler).__name__
    if getattr(scheduler, "is_fusedlr_view", False):
        raise ValueError(f"scheduler={name} shows a fusedlr schedule: take it from group['schedule']")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(f"scheduler={name} follows a metric, not the step: it has no table")
    if getattr(scheduler, "cycle_momentum", False):
        raise ValueError(
            f"scheduler={name} also cycles momentum, which a learning rate schedule cannot: "
            "pass cycle_momentum=False"
        )


def _refuse_stepped(scheduler: LRScheduler, in_sequence: bool = False) -> None:
    """Raise for a scheduler that is not at its first step.

    A SequentialLR steps its first part when it is made and takes that back from simple schedulers alone, so a
    SequentialLR within it (`in_sequence`) is fresh where its last_epoch is above 0. A ChainedScheduler has no
    last_epoch.
    """
    parts = getattr(scheduler, "_schedulers", ())
    if getattr(scheduler, "last_epoch", 0) > 0 and not (parts and in_sequence):
        raise ValueError(
            f"scheduler={type(scheduler).__name__} has been stepped (last_epoch={scheduler.last_epoch}): "
            "pass a fresh one"
        )
    for part in parts:
        _refuse_stepped(part, in_sequence or hasattr(scheduler, "_milestones"))


def _step(scheduler: LRScheduler, k: int) -> None:
    try:
        scheduler.step()
    except NotImplementedError:
        raise ValueError(
            f"scheduler={type(scheduler).__name__} cannot make step {k + 1}: torch's SequentialLR takes "
            "another SequentialLR or a ChainedScheduler as its first part only"
        ) from None


def _copy(scheduler: LRScheduler) -> LRScheduler:
    """A copy that drives a stand-in for the optimizer, over one dummy number per group."""
    import torch

    optimizer = scheduler.optimizer
    groups = []
    for group in optimizer.param_groups:
        # all numbers of the group are copied: OneCycleLR and SWALR keep rates of their own there
        numbers = {
            key: float(value) for key, value in group.items() if isinstance(value, (Real, torch.Tensor))
        }
        groups.append({"params": [torch.nn.Parameter(torch.zeros(()))], **numbers})
    memo: dict[int, Any] = {id(optimizer): torch.optim.SGD(groups, lr=0.0)}
    # the copy shares parameters, and the owners of methods used as lr_lambda: nothing of the model is copied
    shared = [p for group in optimizer.param_groups for p in group["params"]]
    for inner in _nested(scheduler):
        shared += [f for f in getattr(inner, "lr_lambdas", ()) if isinstance(f, (MethodType, partial))]
    memo.update((id(x), x) for x in shared)
    return copy.deepcopy(scheduler, memo)


def _peaks(scheduler: LRScheduler) -> list[float]:
    """The peak of every group."""
    from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

    groups = scheduler.optimizer.param_groups
    for inner in _nested(scheduler):
        if isinstance(inner, CyclicLR):
            return [float(lr) for lr in inner.max_lrs]
        if isinstance(inner, OneCycleLR):
            return [group["max_lr"] for group in groups]
    return [group["initial_lr"] for group in groups]
