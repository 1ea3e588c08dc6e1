"""`fusedlr.hf.Cooldown`: a run that cools down from a step on, or in time to end by a given hour."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from fusedlr import arguments
from fusedlr.optimizer import FusedAdamW
from fusedlr.schedule.changes import FALLS
from fusedlr.warn import warn
from fusedlr.wrapped import innermost, schedule_of, unwrap

# updates whose time tells how fast the run is now: enough to even out batches of different lengths
_RECENT = 50
# A cooldown that would end late is shortened once its updates take so much longer than planned. A shorter
# one adds a phase to the schedule, and at this share there are at most about 50 for 1,000 updates.
_SLOWER = 0.9
# Several processes have to agree on what the clock says, and each time they wait for one another.
_UPDATES_PER_LOOK = 8


class Cooldown(TrainerCallback):
    """Cools the run down at a given update, or in time to end by a given hour, and then stops it.

    `trainer.add_callback(fusedlr.hf.Cooldown(finish_by=6 * 3600, steps=500))`. The optimizer must be
    `FusedAdamW` with a schedule, as `FusedLRTrainer` makes it. The cooldown is `FusedAdamW.cooldown`, which a
    checkpoint carries; a resumed run goes on with it. Skipped steps do not count. Where the arguments
    evaluate or save every so many steps, this is also done at the end, as after `max_steps`.

    With `finish_by` the time per update is measured, evaluations and checkpoints between updates included, as
    the larger of the mean of the run and that of the last 50 updates. The cooldown begins when just `steps`
    updates fit into the time that is left, and becomes shorter where they turn out to take longer. What comes
    after the last update, such as a last evaluation and saving, needs time beyond that: leave some. Of
    several processes the first one's clock decides, every 8 updates.

    Args:
        steps: updates in the cooldown, at least 1.
        at_step: updates before the cooldown, at least 1.
        finish_by: instead of `at_step`, when the last update should be made: a `datetime` (without a time
            zone it is local), or seconds from the beginning of the training.
        shape: `linear`, `cosine` or `1-sqrt`.
        to: share of the peak that it ends at, in [0, 1].
        clock: tells the time in seconds since 1970.

    Raises:
        ValueError: an argument is out of range, or not exactly one of `at_step` and `finish_by` is given; or,
            when training begins, `finish_by` has passed or the optimizer has no schedule to change.
    """

    def __init__(
        self,
        steps: int,
        *,
        at_step: int | None = None,
        finish_by: datetime | float | None = None,
        shape: str = "1-sqrt",
        to: float = 0.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if (at_step is None) == (finish_by is None):
            raise ValueError(
                f"Cooldown needs one of at_step and finish_by, got at_step={arguments.shown(at_step)} and "
                f"finish_by={arguments.shown(finish_by)}"
            )
        self._steps = arguments.count("steps", steps, at_least=1)
        self._at_step = None if at_step is None else arguments.count("at_step", at_step, at_least=1)
        if finish_by is not None and not isinstance(finish_by, datetime):
            finish_by = arguments.positive("finish_by", finish_by)
        self._finish_by = finish_by
        self._shape = arguments.choice("shape", shape, FALLS, show=str)
        self._to = arguments.ratio("to", to)
        self._clock = clock
        self._deadline = 0.0
        # somebody may cancel a cooldown, which is then not begun again
        self._begun = False
        # when the first update of this training ended, how many have since, and when the last of them did
        self._first_end: float | None = None
        self._updates = 0
        self._ends: deque[float] = deque(maxlen=_RECENT + 1)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Check that there is a schedule to change, and note the time."""
        fused = unwrap(optimizer)
        if fused is None or schedule_of(fused) is None:
            name = innermost(optimizer) if fused is None else "FusedAdamW without a schedule"
            raise ValueError(
                f"Cooldown changes the schedule of a FusedAdamW, and this Trainer's optimizer is {name}: use "
                "FusedLRTrainer, with a schedule that depends on the step alone"
            )
        now, given, self._begun = self._clock(), self._finish_by, False
        self._first_end, self._updates = None, 0
        self._ends.clear()
        if given is not None:
            self._deadline = given.timestamp() if isinstance(given, datetime) else now + given
            if self._deadline <= now:
                raise ValueError(f"finish_by={given} has passed")
        elif self._at_step is not None and self._at_step + self._steps > state.max_steps:
            warn(
                f"the cooldown from at_step={self._at_step} on has steps={self._steps}, and training will "
                f"end before it does, after {state.max_steps} updates"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> Any:
        """Begin the cooldown when its time has come, and stop the training when it is done."""
        fused = unwrap(optimizer)
        if fused is None:
            return control
        left = self._left(fused)
        self._begun = self._begun or left is not None
        if left is not None and left <= 0:
            return _stopped(args, state, control)
        if self._at_step is not None:
            if not self._begun and state.global_step >= self._at_step:
                self._cool(fused, self._steps)
            return control
        fits = self._fits(args, state)
        if fits is None:
            return control
        possible = max(1, min(fits, state.max_steps - state.global_step))
        if left is not None:
            if possible < _SLOWER * left:
                self._cool(fused, possible)
        elif not self._begun and fits - _per_look(args) < self._steps:
            if fits < _SLOWER * self._steps:
                warn(
                    f"the cooldown is of {possible} updates instead of steps={self._steps}: no more fit "
                    f"before finish_by={self._finish_by}"
                )
            self._cool(fused, min(possible, self._steps))
        return control

    def _cool(self, fused: FusedAdamW, steps: int) -> None:
        fused.cooldown(steps, self._shape, self._to)

    def _left(self, fused: FusedAdamW) -> int | None:
        """Updates until the cooldown under way is done; None if there is none."""
        for i, group in enumerate(fused.param_groups):
            schedule = group.get("schedule")
            if schedule is not None and schedule.changes and schedule.changes[-1].kind == "cooldown":
                end = schedule.changes[-1].k + schedule.changes[-1].steps
                if group["k"] < end:
                    return end - group["k"]
                # the host may have counted steps that were skipped; to ask the device means to wait for it
                return end - int(fused.metrics()["step"][i])
        return None

    def _fits(self, args: Any, state: Any) -> int | None:
        """How many more updates fit into the time; None where that is not known or not looked at now."""
        now = self._clock()
        self._ends.append(now)
        if self._first_end is None:
            # the first update of a training also allocates and compiles
            self._first_end = now
            return None
        self._updates += 1
        if state.global_step % _per_look(args):
            return None
        run = (now - self._first_end) / self._updates
        recent = (now - self._ends[0]) / (len(self._ends) - 1)
        # a clock that stands still says nothing
        slowest = max(run, recent, 1e-9)
        fits = max(0, int((self._deadline - now) / slowest))
        return broadcast_object_list([fits])[0] if args.world_size > 1 else fits


def _per_look(args: Any) -> int:
    return _UPDATES_PER_LOOK if args.world_size > 1 else 1


def _stopped(args: Any, state: Any, control: Any) -> Any:
    """Stop the training, and do what the Trainer does after the last of `max_steps`."""
    control.should_training_stop = True
    if _is_by_steps(args.eval_strategy) and args.eval_delay <= state.global_step:
        control.should_evaluate = True
    if _is_by_steps(args.save_strategy):
        control.should_save = True
    return control


def _is_by_steps(strategy: Any) -> bool:
    return getattr(strategy, "value", strategy) == "steps"
