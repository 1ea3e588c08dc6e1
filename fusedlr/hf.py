"""Hugging Face Trainer: optimizer and schedule from `TrainingArguments`, clipping inside the step.

Needs transformers (`pip install 'fusedlr[hf]'`). One line in a script: `FusedLRTrainer` for `Trainer`; a
class of your own with `FusedLRTrainerMixin` for trl and others; `patch_transformers()` for YAML-driven tools.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor
from torch.amp.grad_scaler import OptState
from transformers import Trainer, TrainerCallback

from fusedlr.groups import give_names
from fusedlr.guard import ZClip
from fusedlr.hf_cooldown import Cooldown
from fusedlr.hf_options import constructor_arguments
from fusedlr.logs import Nonfinite, scalars, write_recording
from fusedlr.optimizer import FusedAdamW
from fusedlr.schedule import Schedule, from_hf, knows_hf
from fusedlr.scheduler import ScheduleView
from fusedlr.warn import warn
from fusedlr.wrapped import innermost, schedule_of, unwrap

# oldest and newest transformers that the tests of this module have passed with
TESTED = ("5.0.0", "5.24.0")
# oldest with the private hook by which the Trainer leaves clipping to somebody else
CLIP_HOOK = "_clip_grad_norm"
CLIP_HOOK_SINCE = "5.3.0"
# share of the schedule that may be missed in silence: a cosine's last 5 % lie below 0.62 % of the peak
_FAR = 0.05


class _FusedTrainer(Trainer):
    """What `FusedLRTrainerMixin` changes in transformers' own Trainer, and so in every class based on it."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with `FusedLRCallback` at work."""
        callback = _report_first(self)
        # an optimizer that is there before the first run was passed in
        own = f"made by {getattr(type(self).create_optimizer, '__qualname__', 'create_optimizer')}"
        callback.origin = callback.origin or (own if self.optimizer is None else "passed to it")
        return super().train(*args, **kwargs)

    @classmethod
    def get_optimizer_cls_and_kwargs(cls, args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """As the Trainer's, with `FusedAdamW` for torch's AdamW."""
        stock = super().get_optimizer_cls_and_kwargs(args, model)
        replaced = _replaced(*stock, args, model)
        if not (isinstance(replaced[0], type) and issubclass(replaced[0], FusedAdamW)):
            raise ValueError(
                f"optim={getattr(args.optim, 'value', args.optim)!r} is not torch's AdamW, which fusedlr "
                "replaces: use optim='adamw_torch_fused', or the Trainer without fusedlr"
            )
        return replaced

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Bind the arguments' schedule to the optimizer; the scheduler is the optimizer's own view of it."""
        return _create_scheduler(self, super().create_scheduler, num_training_steps, optimizer)

    def _clip_grad_norm(self, model: Any) -> Any:
        return _clip(self, super()._clip_grad_norm, model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return _get_norm(self, super()._get_grad_norm, model, grad_norm)


if TYPE_CHECKING:
    # the mixin stands before a Trainer
    _Base = Trainer
else:
    _Base = object


class FusedLRTrainerMixin(_Base):
    """Put it before a Trainer class: `class MyTrainer(FusedLRTrainerMixin, SFTTrainer): ...`.

    Where the arguments ask for AdamW the optimizer is `FusedAdamW`, with the Trainer's own param groups, and
    where its schedule depends on the step alone it drives itself. It clips inside its step, the norm is
    logged as before, and `FusedLRCallback` is at work. What the Trainer class itself says of its optimizer,
    scheduler and norm stands: only transformers' own methods, which it may call, are replaced. An optimizer
    passed to the Trainer is used as it is; a `FusedAdamW` without a schedule gets the one of the arguments.
    If the optimizer is not `FusedAdamW` in the end, a warning at the beginning of the training says so.
    Where parameters that are trained are bf16 it has `master_weights=True`, and a warning says so once.
    `TrainingArguments(optim_args="...")` turns that off (`master_weights=false`), or on for fp16 ones, and
    asks for a record (`record=1024`) and for a `fusedlr.ZClip` (`zclip=2.5`); separated by commas.
    With FSDP 1 and DeepSpeed the Trainer clips; with FSDP 2 the step does, as on one device.

    Raises:
        ValueError: `optim` is not one of torch's AdamW, or `optim_args` asks for what there is not.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Put the replaced methods directly before transformers' Trainer, behind those of its subclasses."""
        super().__init_subclass__(**kwargs)
        bases = [base for base in cls.__bases__ if base is not _FusedTrainer]
        if any(issubclass(base, Trainer) for base in bases):
            at = bases.index(Trainer) if Trainer in bases else len(bases)
            cls.__bases__ = (*bases[:at], _FusedTrainer, *bases[at:])


class FusedLRTrainer(FusedLRTrainerMixin, Trainer):
    """`transformers.Trainer` on `FusedAdamW`; see `FusedLRTrainerMixin`."""


class FusedLRCallback(TrainerCallback):
    """Logs what `fusedlr.logs.scalars` has, and says when a run and its schedule do not end together.

    Beside the loss appear `skipped_steps` once a step has been skipped, and `update_ratio/...` where the
    optimizer records tensors, as of the last copy that has reached the host: nothing waits for the device. A
    warning names the first tensor whose gradient was inf or nan in a skipped step. At the end of the training
    a recording goes to `record.npz` in `output_dir`. `FusedLRTrainer` brings the callback along; with a plain
    Trainer pass `callbacks=[FusedLRCallback()]`, and reporters listed before it will not see the numbers.
    """

    # who made the optimizer, where that is known
    origin = ""

    def __init__(self) -> None:
        self._told = False
        self._nonfinite = Nonfinite()

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Say what is not fusedlr's, and compare the schedule's length with the run's."""
        self._told = False
        fused = unwrap(optimizer)
        if fused is None:
            origin = self.origin and f", {self.origin}"
            warn(
                f"this Trainer's optimizer is {innermost(optimizer)}{origin}, and not FusedAdamW: nothing "
                "of fusedlr is at work. A create_optimizer of your own gets FusedAdamW from "
                "self.get_optimizer_cls_and_kwargs; for code that asks the class for it there is "
                "patch_transformers()"
            )
            return
        # a limit of the run before
        if fused in _limits:
            _limit(fused, None)
        schedule, driver = schedule_of(fused), getattr(lr_scheduler, "scheduler", lr_scheduler)
        if schedule is not None and not isinstance(driver, ScheduleView):
            warn(
                f"the learning rate follows this Trainer's {type(driver).__name__}, and not the optimizer's "
                f"own schedule, {schedule!r}: give the Trainer optimizer.scheduler, or the optimizer "
                "schedule=None"
            )
        # a run that has begun to cool down ends with that
        if schedule is None or not schedule.changes:
            self._compare(optimizer, state.max_steps, "training will end after")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Add our numbers to what is logged with the loss."""
        fused = unwrap(optimizer)
        if fused is None or not logs or "loss" not in logs:
            return
        self._nonfinite.tell(fused)
        # the Trainer's own norm is that of this very step
        new = {name: value for name, value in scalars(fused).items() if name not in logs}
        logs.update(new)
        if state.log_history:
            # the history has got a copy of the logs already
            state.log_history[-1].update(new)

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Write the recording; compare the schedule's length with the updates made, unless stopped early."""
        fused = unwrap(optimizer)
        if fused is None:
            return
        write_recording(fused, args.output_dir, writes=state.is_world_process_zero)
        if state.global_step >= state.max_steps:
            self._compare(optimizer, int(fused.metrics()["step"].max()), "training ended after")

    def _compare(self, optimizer: Any, updates: int, event: str) -> None:
        schedule = schedule_of(unwrap(optimizer))
        total = schedule.total_steps if schedule is not None else None
        if schedule is None or total is None or self._told or abs(updates - total) <= _FAR * total:
            return
        self._told = True
        last, end = schedule.lr_at(updates - 1), schedule.lr_at(total - 1)
        warn(
            f"{event} {updates} updates, but the schedule is {schedule!r}: the last rate is {last:.1%} of "
            f"the peak where the schedule's last is {end:.1%}. total_steps counts updates that are made, not "
            "batches"
        )


class Patch:
    """What `patch_transformers` has changed, until `undo()` or the end of a `with` block.

    Attributes:
        used: whether a Trainer was given `FusedAdamW` since.
    """

    used = False

    def __init__(self) -> None:
        self._before: dict[str, Any] = {}
        self._ours: dict[str, Any] = {}
        for name, replacement in _REPLACEMENTS.items():
            # absent from older versions: nothing there would call it
            if hasattr(Trainer, name):
                self._before[name] = Trainer.__dict__[name]
                self._ours[name] = _patched(getattr(Trainer, name), replacement)
        for name, value in self._ours.items():
            setattr(Trainer, name, value)

    def undo(self) -> None:
        """Give transformers back its own methods; a second time changes nothing.

        Raises:
            RuntimeError: something else has patched one of them since.
        """
        global _patch
        changed = [name for name, ours in self._ours.items() if Trainer.__dict__[name] is not ours]
        if changed:
            raise RuntimeError(
                f"Trainer.{', Trainer.'.join(changed)} was patched again after patch_transformers(): "
                "undo that first"
            )
        for name, before in self._before.items():
            setattr(Trainer, name, before)
        self._ours = {}
        self._before = {}
        _patch = None

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


_patch: Patch | None = None


def patch_transformers() -> Patch:
    """Make every Trainer of this process one on `FusedAdamW`, for tools that are driven by YAML alone.

    Only where `optim` is torch's AdamW; all else stays stock. Nothing is patched on import.

    Returns:
        A `Patch`: `undo()` it, or use it in a `with` statement. A second call returns the first one's.
    """
    global _patch
    if _patch is None:
        _patch = Patch()
    return _patch


def _replaced(cls: Any, kwargs: dict[str, Any], args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
    # a subclass has a step of its own, which stands
    if cls is not torch.optim.AdamW:
        return cls, kwargs
    asked = constructor_arguments(args.optim_args)
    if "master_weights" not in asked and _trains_bf16(model):
        asked["master_weights"] = True
        _say_master_weights()
    return FusedAdamW, {**kwargs, **asked}


def _trains_bf16(model: Any) -> bool:
    return model is not None and any(
        p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters()
    )


@functools.cache
def _say_master_weights() -> None:
    warn(
        "bf16 parameters are trained: FusedAdamW keeps the rest of their fp32 values in its state, 2 bytes "
        "per parameter (master_weights=True), so that no update is lost. "
        'TrainingArguments(optim_args="master_weights=false") turns it off'
    )


# per optimizer the schedule that a Trainer has started last
_started: WeakKeyDictionary[FusedAdamW, Schedule | None] = WeakKeyDictionary()

# each takes the trainer, the stock method bound to it, and that method's arguments


def _create_scheduler(trainer: Any, stock: Any, num_training_steps: int, optimizer: Any = None) -> Any:
    fused = unwrap(optimizer if optimizer is not None else trainer.optimizer)
    if fused is None or trainer.lr_scheduler is not None:
        return stock(num_training_steps, optimizer)
    _warn_without_hook(trainer.args.max_grad_norm)
    _report_first(trainer)
    # the Trainer makes its groups without them
    give_names(fused.param_groups, trainer.model.named_parameters())
    # another run starts the arguments' schedule anew, and leaves one of the caller's alone
    own = schedule_of(fused)
    if own is None or own.original == _started.get(fused):
        schedule = _asked_for(trainer.args, num_training_steps)
        if schedule is None:
            # one that was started for an earlier run would go on
            for group in fused.param_groups:
                if group.get("schedule") is not None:
                    group["schedule"] = None
            return stock(num_training_steps, optimizer)
        fused.start_schedule(schedule)
        _started[fused] = schedule_of(fused)
    trainer.lr_scheduler = fused.scheduler
    trainer._created_lr_scheduler = True
    return trainer.lr_scheduler


def _clip(trainer: Any, stock: Any, model: Any) -> Any:
    fused = unwrap(trainer.optimizer)
    if fused is None or not _can_clip(trainer, fused):
        return stock(model)
    _limit(fused, trainer.args.max_grad_norm)
    return fused.grad_norm(_scale(trainer, fused))


def _get_norm(trainer: Any, stock: Any, model: Any, grad_norm: Any = None) -> Any:
    fused = unwrap(trainer.optimizer)
    if fused is None or grad_norm is not None or not _can_clip(trainer, fused):
        return stock(model, grad_norm=grad_norm)
    if not trainer.args.max_grad_norm > 0:
        _limit(fused, None)
    return fused.grad_norm(_scale(trainer, fused))


# per optimizer its own limit, and the one that the step was given last
_limits: WeakKeyDictionary[FusedAdamW, tuple[float | ZClip | None, float | ZClip | None]]
_limits = WeakKeyDictionary()


def _limit(fused: FusedAdamW, asked: float | None) -> None:
    """Clip to the smaller of the optimizer's own limit and `asked`, as if both clipped in turn."""
    now = fused.max_grad_norm
    own, given = _limits.get(fused, (now, now))
    if now != given:
        # assigned from outside since
        own = now
    limit: float | ZClip | None
    if isinstance(own, ZClip):
        limit = own.capped(asked)
    else:
        limit = min((x for x in (own, asked) if x is not None), default=None)
    if limit != now:
        fused.max_grad_norm = limit
    _limits[fused] = own, limit


def _scale(trainer: Any, fused: FusedAdamW) -> Tensor | None:
    """What the gradients are multiplied by; None where that is nothing."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    if scaler is None or not scaler.is_enabled() or _is_unscaled(scaler, fused):
        return None
    # the scale as a tensor, which nothing waits for
    return scaler.scale(torch.ones((), device=scaler._device))


def _is_unscaled(scaler: Any, fused: FusedAdamW) -> bool:
    """Whether somebody has called `unscale_` since the last step; torch has no public question for it."""
    stage = scaler._per_optimizer_states[id(fused)]["stage"]
    return stage is OptState.UNSCALED


def _get_optimizer_cls_and_kwargs(trainer: Any, stock: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict]:
    replaced = _replaced(*stock(*args, **kwargs), *args, **kwargs)
    if _patch is not None and replaced[0] is FusedAdamW:
        _patch.used = True
    return replaced


_REPLACEMENTS: dict[str, Any] = {
    "create_scheduler": _create_scheduler,
    "_clip_grad_norm": _clip,
    "_get_grad_norm": _get_norm,
    "get_optimizer_cls_and_kwargs": _get_optimizer_cls_and_kwargs,
}


def _patched(stock: Any, replacement: Any) -> Any:
    if replacement is _get_optimizer_cls_and_kwargs:
        # static in the Trainer, and called on the class by some
        return staticmethod(functools.wraps(stock)(functools.partial(replacement, None, stock)))

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, functools.partial(stock, self), *args, **kwargs)

    return method


def _asked_for(args: Any, num_training_steps: int) -> Schedule | None:
    """The schedule of the arguments, None where the Trainer's own scheduler has to drive."""
    if not knows_hf(args.lr_scheduler_type):
        return None
    return from_hf(
        args.lr_scheduler_type,
        num_warmup_steps=args.get_warmup_steps(num_training_steps),
        num_training_steps=num_training_steps,
        **(args.lr_scheduler_kwargs or {}),
    )


def _can_clip(trainer: Any, fused: FusedAdamW) -> bool:
    """Whether the optimizer sees whole gradients, or parts that say so (FSDP2's), and has one norm."""
    kind = trainer.accelerator.distributed_type.value
    seen = kind == "NO" or kind.startswith("MULTI_") or getattr(trainer.accelerator, "is_fsdp2", False)
    return fused.groups == "joint" and seen


def _report_first(trainer: Any) -> FusedLRCallback:
    """Put the callback before the reporters, which log what they find when they are called."""
    callbacks = trainer.callback_handler.callbacks
    own = next((callback for callback in callbacks if isinstance(callback, FusedLRCallback)), None)
    if own is not None:
        callbacks.remove(own)
    callbacks.insert(0, own := own or FusedLRCallback())
    return own


@functools.cache
def _warn_missing_hook() -> None:
    warn(
        f"transformers {transformers.__version__} has no Trainer.{CLIP_HOOK}, which {CLIP_HOOK_SINCE} to "
        f"{TESTED[1]} have: the Trainer clips by itself, in a pass over the gradients of its own"
    )


def _warn_without_hook(max_grad_norm: float) -> None:
    if max_grad_norm > 0 and not callable(getattr(Trainer, CLIP_HOOK, None)):
        _warn_missing_hook()


__all__ = [
    "Cooldown",
    "FusedLRCallback",
    "FusedLRTrainer",
    "FusedLRTrainerMixin",
    "patch_transformers",
    "unwrap",
]
