"""`optimizer.scheduler`: the face of an `LRScheduler` on a schedule that the optimizer itself drives."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fusedlr.checkpoint import (
    OWN_KEY,
    check_scopes,
    own_state,
    read_own,
    read_steps,
    report,
    scheduler_disagreements,
)
from fusedlr.counts import Counts
from fusedlr.eager import eager
from fusedlr.schedule import Schedule
from fusedlr.warn import warn


class ScheduleView(LRScheduler):
    """What trainers, loggers and checkpoints expect of a scheduler; it counts nothing of its own.

    `step()` only shows the rate of the coming update in `group["lr"]`, so it may be called once, never, or
    once per process, before or after `optimizer.step()`. All state is the optimizer's.
    """

    # `fusedlr.from_torch` knows this class by this attribute
    is_fusedlr_view = True

    def __init__(self, optimizer: Optimizer, counts: Counts) -> None:
        # not LRScheduler.__init__: it would wrap optimizer.step and write group["lr"]
        self.optimizer = optimizer
        self._counts = counts

    @property
    def base_lrs(self) -> list[float]:  # type: ignore[override]
        """The peak of every group."""
        return [float(group.get("initial_lr", group["lr"])) for group in self.optimizer.param_groups]

    @property
    def last_epoch(self) -> int:
        """The step whose rate `get_last_lr` gives, counted from 0."""
        return self._counts.shown[0]

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        raise AttributeError(
            "optimizer.scheduler shows a schedule that the optimizer drives: another scheduler cannot drive "
            "it. Pass schedule=None and compose torch's, or put the whole schedule into one fusedlr.table"
        )

    @property
    def _step_count(self) -> int:
        return self.last_epoch + 1

    @_step_count.setter
    def _step_count(self, value: int) -> None:
        """accelerate counts micro-batches here; the optimizer counts updates."""

    @property
    def _last_lr(self) -> list[float]:  # type: ignore[override]
        return self.get_last_lr()

    @property
    def lr_lambdas(self) -> list[Callable[[int], float]]:
        """Per group a function of the step that gives its rate in units of the peak, as `LambdaLR` has."""
        return [partial(_ratio, schedule=group.get("schedule")) for group in self.optimizer.param_groups]

    # torch.compile cannot follow groups that are no plain dicts
    @eager
    def step(self, epoch: int | None = None) -> None:
        """Show the rate of the coming update in `group["lr"]`. `epoch` is accepted and has no effect."""
        self._counts.show_next(self.optimizer.param_groups)

    @eager
    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """Per group, the rate of the update just made, or of the coming one after `step()`; plain floats."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """As `get_last_lr`."""
        return self.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """The keys of `LambdaLR`'s state in plain numbers, and `k`: updates made, per group.

        A `LambdaLR` that loads it leaves `k` alone and counts on in `last_epoch`: `k_at_epoch` tells how far.
        """
        groups = self.optimizer.param_groups
        self._counts.adopt(groups)
        k = self._counts.read(groups)
        return {
            "base_lrs": self.base_lrs,
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_is_initial": False,
            "_get_lr_called_within_step": False,
            "_last_lr": self.get_last_lr(),
            "lr_lambdas": [None] * len(groups),
            "k": k,
            "k_at_epoch": self.last_epoch,
            # once more what the optimizer's file has, for tools that drop from it what they don't know
            OWN_KEY: own_state(
                groups,
                self.optimizer.state,
                k,
                self._counts.read_skipped(),
                self._counts.read_norms(),
                joint=self._counts.joint,
            ),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from this view's state or from `LambdaLR`'s: its `last_epoch` becomes the next step.

        It overrides what the optimizer's own checkpoint says, whichever is loaded first. A rate of torch's
        scheduler that this schedule does not give at that step is reported. If the schedule gives it at the
        step where the optimizer stands, that scheduler has counted something else, epochs say, and the
        optimizer's own step stands.

        Raises:
            ValueError: there is no usable `last_epoch` in it, or what it says of our schedules is malformed.
        """
        groups = self.optimizer.param_groups
        self._counts.adopt(groups)
        steps = read_steps(state_dict, groups)
        taken = read_own(state_dict.get(OWN_KEY), groups)
        if taken is not None:
            check_scopes(groups, taken)
        lines = scheduler_disagreements(groups, state_dict, steps)
        own = self._counts.read(groups) if lines else steps
        if own != steps and not scheduler_disagreements(groups, state_dict, own):
            warn(
                f"last_epoch={state_dict['last_epoch']} in the scheduler's state does not count updates: its "
                f"rate is that of k = {own[0]}, where this optimizer stands and goes on"
            )
            return
        report(lines)
        if taken is not None:
            self._counts.take_own(groups, taken, state_dict[OWN_KEY])
        self._counts.go_to(groups, steps)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a copy is the view of the optimizer's copy
        return operator.attrgetter("scheduler"), (self.optimizer,)


def _ratio(k: int, schedule: Schedule | None) -> float:
    return 1.0 if schedule is None else schedule.lr_at(k)
