"""`FusedAdamW`: AdamW, learning rate schedule, clipping and AMP unscale-and-skip as one optimizer step."""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from operator import is_
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from fusedlr import arguments, backends, checkpoint
from fusedlr.eager import eager
from fusedlr.groups import Notes, ParamGroup, set_quietly
from fusedlr.mirror import Mirror
from fusedlr.plan import Plan, trainable
from fusedlr.reference import Counters, GroupStep, Signals
from fusedlr.schedule import Schedule, check_schedule
from fusedlr.scheduler import ScheduleView
from fusedlr.warn import warn

_NO_SIGNALS = Signals()


@dataclass
class _Prepared:
    """A step made ready: what the next one can use again if only gradients and given rates have changed."""

    backend: backends.Backend
    groups: list[dict[str, Any]]
    steps: list[GroupStep]
    written: list[bool]  # whose lr was assigned from outside, over a schedule of its own
    scheduled: bool  # whether there is a schedule that such an assignment would overrule
    given: list[int]  # groups whose rate is read anew for every step
    again: bool
    repeat: Any = None  # the backend's own way to do so, in one call


def _is_plain(group: dict[str, Any]) -> bool:
    """Whether no hyperparameter can be changed in place, as a list or a tensor can: nothing would note it."""
    values = (group["eps"], group["weight_decay"], group.get("max_grad_norm", 0.0), *group["betas"])
    return type(group["betas"]) is tuple and all(type(x) in (float, int, NoneType) for x in values)


class FusedAdamW(Optimizer):
    r"""AdamW with its learning rate schedule, gradient clipping and loss-scaling skip in one step.

    Equivalent to, per step::

        scaler.unscale_(optimizer)                                # if a GradScaler drives it
        clip_grad_norm_(params, max_grad_norm)                    # p.grad itself stays as it was
        if every gradient is finite:                              # see `nonfinite`; decided on the device
            torch.optim.AdamW.step()                              # with lr = peak * schedule(k)
            scheduler.step()                                      # k += 1

    Args:
        params: parameters, named parameters or dicts of param groups, as torch takes them. A group may have
            its own `lr` (peak), `betas`, `eps`, `weight_decay`, `amsgrad`, `maximize`, `schedule`, and with
            `groups="independent"` its own `max_grad_norm`.
        lr: peak learning rate, >= 0. Without a schedule may be a tensor of one element, read on its device.
        betas: decay rates of the moments, in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled decay, >= 0.
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018).
        schedule: a `fusedlr.Schedule`; None is a constant rate that outside schedulers may drive.
        max_grad_norm: clip to this L2 norm of all (unscaled) gradients, > 0; None does not clip.
        nonfinite: `"skip"` leaves everything as it was when a gradient is inf or nan; `"propagate"` is torch.
            Default: skip when `max_grad_norm` is set.
        groups: `"joint"`: one norm and one decision to skip for all groups, as torch. `"independent"`: each
            group is an optimizer of its own, and its schedule advances only when it had a gradient.
        amp_scaling: take part in `torch.amp.GradScaler`'s protocol for fused optimizers.
        state_dtype: None keeps fp32 moments for bf16 and fp16 parameters; `"param"` keeps them in the
            parameter's dtype, as torch.
        backend: `"auto"` or a name from `fusedlr.backends`; a backend that cannot run raises and says why.
        maximize: climb instead of descend.
        foreach, capturable, fused: accepted for torch's signature; without effect.
        differentiable: must be False.

    Raises:
        ValueError: an argument is out of range, or parameters are duplicate.
        TypeError: `schedule` is not a `Schedule`.
        RuntimeError: `backend` cannot run here.

    >>> import fusedlr
    >>> p = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = fusedlr.FusedAdamW([p], lr=0.1, schedule=fusedlr.linear(warmup_steps=2, total_steps=10))
    >>> for _ in range(3):
    ...     p.grad = torch.ones(3)
    ...     optimizer.step()
    >>> optimizer.scheduler.get_last_lr()
    [0.1]
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        schedule: Schedule | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str | None = None,
        groups: str = "joint",
        amp_scaling: bool = True,
        state_dtype: str | None = None,
        backend: str = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if differentiable:
            raise ValueError("differentiable=True is not supported: the step writes in place")
        arguments.choice("nonfinite", nonfinite, (None, "skip", "propagate"))
        arguments.choice("groups", groups, ("joint", "independent"))
        arguments.choice("state_dtype", state_dtype, (None, "param"))
        check_schedule(schedule)
        self._settings: dict[str, Any] = {
            "schedule": schedule,
            "max_grad_norm": arguments.max_grad_norm(max_grad_norm),
            "nonfinite": nonfinite,
            "groups": groups,
            "amp_scaling": bool(amp_scaling),
            "state_dtype": state_dtype,
            "backend": backends.check_name(backend),
        }
        self._notes = Notes()
        defaults = {
            "lr": lr,
            "betas": arguments.betas(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": False,
            "differentiable": False,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        arguments.hyperparameters(defaults)
        super().__init__(params, defaults)
        self._start(k=[0] * len(self.param_groups))
        self._backend(warn=False)
        self._warn_absolute()

    def _start(self, k: list[int], skipped: list[int] | None = None) -> None:
        """Make everything that is not part of the state: plan, counters, what the host knows."""
        if self._settings["amp_scaling"]:
            self._step_supports_amp_scaling = True
        self._plan = Plan(self._settings["state_dtype"])
        self._prepared: _Prepared | None = None
        self._view: weakref.ref[ScheduleView] | None = None
        self._k_loaded: list[int] | None = None
        self._warned_write = self._warned_fallback = False
        self._counters = Counters.zeros(len(k), self._device(torch.device("cpu")))
        self._mirror = Mirror(self._counters)
        if skipped:
            self._counters.skipped.copy_(torch.tensor(skipped, device="cpu"))
        self._place_k(k)
        self._show(self._mirror.k)

    # --- the step

    @eager
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Unscale, clip, evaluate the schedule, update, count. Never copies anything to the host on a GPU.

        Args:
            closure: reevaluates the model and returns the loss; it runs before gradients are read.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient cannot be used; names the parameter. Nothing has been changed then.
        """
        # torch wraps `step` in a profiler range and two hook loops that cost as much as a small step
        if torch.autograd._profiler_enabled():
            with torch.autograd.profiler.record_function(f"Optimizer.step#{type(self).__name__}.step"):
                return self._hooked_step(closure)
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
        ):
            return self._hooked_step(closure)
        loss = None
        if closure is not None or not self._repeat():
            loss = self._step(closure)
        self._optimizer_step_code()
        return loss

    # tells torch.optim.Optimizer that the hooks are dispatched here
    step.hooked = True  # type: ignore[attr-defined]

    def _hooked_step(self, closure: Callable[[], Any] | None) -> Any:
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        kwargs: dict[str, Any] = {}
        before = torch_optimizer._global_optimizer_pre_hooks, self._optimizer_step_pre_hooks
        for hook in chain.from_iterable(hooks.values() for hooks in before if hooks):
            result = hook(self, args, kwargs)
            if result is None:
                continue
            if not (isinstance(result, tuple) and len(result) == 2):
                raise RuntimeError(f"a step pre-hook must return None or (args, kwargs), got {result!r}")
            args, kwargs = result
        loss = self._step(*args[1:], **kwargs)
        self._optimizer_step_code()
        after = self._optimizer_step_post_hooks, torch_optimizer._global_optimizer_post_hooks
        for hook in chain.from_iterable(hooks.values() for hooks in after if hooks):
            hook(self, args, kwargs)
        return loss

    def _repeat(self) -> bool:
        """Make the step in one call of the backend, if it is like the last one; else do nothing."""
        prepared, notes, mine = self._prepared, self._notes, self.__dict__
        if (
            prepared is None
            or prepared.repeat is None
            or notes.changed
            or (prepared.scheduled and notes.writes)
        ):
            return False
        # None, too, is a signal's absence
        if mine.get("grad_scale") is not None or mine.get("found_inf") is not None:
            return False
        told = prepared.repeat(self.param_groups, self.state, torch.get_num_threads())
        if told is None:
            return False
        if not told:
            # the device counts, and does not tell
            self._after_step(prepared, None)
            return True
        self._k_loaded = None
        self._shown = self._mirror.k
        notes.writes.clear()
        self._mirror.tell(told[0], told[1])
        return True

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        # what is the same in the next step is kept in `_Prepared` and in the plan. Asked for anew: whether a
        # group was written to (one flag), and every parameter, gradient and state tensor (the plan's watch)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        signals = _NO_SIGNALS
        if scale is not None or inf is not None:
            signals = Signals(
                arguments.one_element("grad_scale", scale), arguments.one_element("found_inf", inf)
            )
        prepared = self._prepared
        try:
            if prepared is None or not self._holds(prepared):
                prepared = self._prepare()
            elif self._counters.k.is_cuda and torch.cuda.is_current_stream_capturing():
                self._check_capture(fresh=False)
            read = prepared.backend.step_(prepared.steps, self._counters, signals, joint=self._joint)
        finally:
            self._plan.release()
        self._after_step(prepared, read)
        if prepared.repeat is None and prepared.again:
            prepared.repeat = prepared.backend.repeat(prepared.steps, prepared.groups, joint=self._joint)
        return loss

    def _holds(self, prepared: _Prepared) -> bool:
        """Whether what was prepared for an earlier step is right for this one."""
        groups, notes = self.param_groups, self._notes
        if len(groups) != len(self._mirror.k):
            return False
        if notes.changed or not prepared.again or (prepared.scheduled and notes.writes):
            return False
        if len(groups) != len(prepared.groups) or not all(map(is_, groups, prepared.groups)):
            return False
        for i in prepared.given:
            rate = groups[i]["lr"]
            # a tensor is read by the step itself
            if not isinstance(rate, float):
                return False
            if rate != prepared.steps[i].lr:
                prepared.steps[i] = replace(prepared.steps[i], lr=float(rate))
        return self._plan.still_holds(groups, self.state)

    @torch.no_grad()
    def _prepare(self) -> _Prepared:
        """Check and pack everything; raises before anything has been changed."""
        self._prepared = None
        self._adopt_groups()
        backend = self._backend()
        fresh = not self.state
        groups = list(self.param_groups)
        # what is not a number raises here, before any group has been updated
        written = [id(group) in self._notes.writes for group in groups]
        steps = [self._group_step(i, group, written[i], fresh) for i, group in enumerate(groups)]
        normed = [step.max_grad_norm is not None or step.skip_nonfinite for step in steps]
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # what is made during a capture is made by a replay, or never
            self._check_capture(fresh=not self._plan.is_ready(groups, self.state))
        rows = self._plan.gather(groups, self.state, normed)
        self._place_counters(backend)
        steps = [replace(step, rows=some) for step, some in zip(steps, rows, strict=True)]
        scheduled = [group.get("schedule") is not None for group in groups]
        over = [a and b for a, b in zip(written, scheduled, strict=True)]
        plain = all(map(_is_plain, groups))
        prepared = _Prepared(
            backend=backend,
            groups=groups,
            steps=steps,
            written=over,
            scheduled=any(scheduled),
            given=[i for i, own in enumerate(scheduled) if not own],
            again=plain and not any(over) and all(step.advance for step in steps),
        )
        self._prepared = prepared
        self._notes.changed = False
        return prepared

    def _group_step(self, index: int, group: dict[str, Any], written: bool, fresh: bool) -> GroupStep:
        schedule = group.get("schedule")
        driven = schedule is not None and not written
        lr: Any = schedule if driven else group["lr"]
        if not isinstance(lr, (Schedule, Tensor)):
            lr = float(lr)
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"lr of group {index} has shape {tuple(lr.shape)}, expected one element")
        # checkpoint tools make a step at lr 0 only to have the state allocated: it is not part of the run
        allocation = schedule is not None and fresh and isinstance(lr, float) and lr == 0
        max_grad_norm = group.get("max_grad_norm", self.max_grad_norm)
        return GroupStep(
            index=index,
            rows=[],
            lr=lr,
            peak=float(group["initial_lr"]) if driven else math.nan,
            betas=arguments.betas(group["betas"]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            max_grad_norm=max_grad_norm,
            skip_nonfinite=self._nonfinite(max_grad_norm) == "skip",
            advance=not allocation,
        )

    def _after_step(self, prepared: _Prepared, read: Any) -> None:
        """Show the rate just used in `group["lr"]` and count the step on the host."""
        self._k_loaded = None
        self._shown = before = self._mirror.k
        rates = read[2] if read is not None else None
        for i, step in enumerate(prepared.steps):
            if isinstance(step.lr, Schedule):
                rate = rates[i] if rates is not None else step.lr.lr_at(before[i], step.peak)
                set_quietly(prepared.groups[i], "lr", rate)
            elif prepared.written[i] and step.advance:
                self._warn_write(i, prepared.groups[i])
        self._notes.writes.clear()
        if read is not None:
            self._mirror.tell(*read[:2])
            return
        self._mirror.advance(
            [step.advance and (self._joint or len(step.rows) > 0) for step in prepared.steps]
        )
        if not self._counters.k.is_cuda:
            # on the CPU the counters are at hand: nothing to wait for
            self._mirror.refresh()

    def _warn_write(self, index: int, group: dict[str, Any]) -> None:
        lr, peak = group["lr"], group["initial_lr"]
        asked = group["schedule"].lr_at(self._mirror.k[index], peak)
        # another formula for the same rate rounds differently; a tensor is not read, that would wait for it
        same = not isinstance(lr, Tensor) and math.isclose(lr, asked, rel_tol=1e-6, abs_tol=1e-9 * peak)
        if self._warned_write or same:
            return
        self._warned_write = True
        value = "a tensor" if isinstance(lr, Tensor) else f"{lr:g}"
        warn(
            f"lr={value} was assigned to group {index} from outside and is used for this step, where the "
            f"optimizer's own schedule gives {asked:g}: another scheduler is at work. Remove it, or pass "
            "schedule=None"
        )

    def _check_capture(self, fresh: bool) -> None:
        if fresh or self._counters.k.device.type == "cpu":
            raise RuntimeError(
                "make one step outside the CUDA graph before capturing it: the state is allocated there"
            )
        missing = sum(p.grad is None for p in self._trainable())
        if missing:
            raise RuntimeError(
                f"{missing} parameters have no gradient while a CUDA graph is being captured: a replay would "
                "never update them. Call zero_grad(set_to_none=False) before the capture"
            )

    @eager
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients: to None, or to zero in place."""
        grads = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if set_to_none:
                    p.grad = None
                    continue
                if p.grad.grad_fn is not None:
                    p.grad.detach_()
                else:
                    p.grad.requires_grad_(False)
                if p.grad.layout == torch.strided:
                    grads.append(p.grad)
                else:
                    p.grad.zero_()
        if grads:
            torch._foreach_zero_(grads)

    # --- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its schedule starts at step 0. The dict passed is copied.

        Raises:
            ValueError: an option is out of range or parameters are duplicate. Nothing has been added then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = dict(param_group)
        # counts of another optimizer's run, if the dict came from one
        group.pop("k", None), group.pop("k_at_step", None)
        if isinstance(group.get("params"), Iterable) and not isinstance(group["params"], (Tensor, set)):
            group["params"] = list(group["params"])
            arguments.duplicates(group["params"])
        arguments.hyperparameters({**self.defaults, **group})
        if "betas" in group:
            group["betas"] = arguments.betas(group["betas"])
        if "max_grad_norm" in group:
            if self._joint:
                raise ValueError(
                    f"max_grad_norm={group['max_grad_norm']!r} in a group needs groups='independent': "
                    "joint groups share one norm"
                )
            arguments.max_grad_norm(group["max_grad_norm"])
        self._resolve_schedule(group)
        super().add_param_group(group)
        self.param_groups[-1] = ParamGroup(group, self._notes)
        if "_mirror" in self.__dict__:
            # not while torch's constructor adds the first groups
            k = [*self._read_k(), 0]
            self._resize_counters(len(k))
            self._place_k(k)
            self._shown = [*self._shown, 0]

    def _resolve_schedule(self, group: dict[str, Any]) -> None:
        """Give a new group its schedule, its peak and its first rate."""
        schedule = group.get("schedule", self._settings["schedule"])
        if isinstance(schedule, (list, tuple)):
            schedule = Schedule.from_numbers(schedule)
        check_schedule(schedule)
        if schedule is None:
            return
        lr = group.get("lr", self.defaults["lr"])
        peak = group.get("initial_lr", lr)
        for value in (lr, self.defaults["lr"], peak):
            if isinstance(value, Tensor):
                raise ValueError(f"lr={value!r} is a tensor, which a schedule cannot drive: pass a float")
        # one factor for all groups, as transformers: absolute levels are relative to the optimizer's own lr
        group["schedule"] = schedule.resolve(self.defaults["lr"])
        group["initial_lr"] = float(peak)
        group["lr"] = group["schedule"].lr_at(0, group["initial_lr"])
        group["k"] = group["k_at_step"] = 0

    def start_schedule(self, schedule: Schedule) -> None:
        """Begin `schedule` at its first update, in every group; moments and their step counts stay.

        For trainers that learn the length of the run after they have built the optimizer. A group's peak is
        its `initial_lr`, its `lr` where it has none.

        Raises:
            TypeError: `schedule` is not a `Schedule`.
            ValueError: a group's lr is a tensor, or an absolute level is above the optimizer's `lr`.
        """
        # None, which is allowed where a schedule is optional, is no schedule here
        check_schedule(schedule if schedule is not None else "None")
        self._adopt_groups()
        peaks = [group.get("initial_lr", group["lr"]) for group in self.param_groups]
        for peak in (*peaks, self.defaults["lr"]):
            if isinstance(peak, Tensor):
                raise ValueError(f"lr={peak!r} is a tensor, which a schedule cannot drive: pass a float")
        resolved = schedule.resolve(self.defaults["lr"])
        for group, peak in zip(self.param_groups, peaks, strict=True):
            set_quietly(group, "schedule", resolved)
            set_quietly(group, "initial_lr", float(peak))
        self._settings["schedule"] = schedule
        self._notes.changed = True
        self._k_loaded = None
        start = [0] * len(self.param_groups)
        self._place_k(start)
        self._show(start)
        self._warn_absolute()

    def extend_schedule(self, total_steps: int) -> None:
        """Lengthen a running schedule on purpose: from here on as if it had been built with `total_steps`.

        The step count stays, so a decay that had begun jumps back up to where the longer one stands. See
        `Schedule.with_total_steps`. Groups without a schedule stay without.

        Raises:
            ValueError: no group has a schedule, one has no rule for more steps (a table), or it is longer
                already. Nothing has been changed then.

        >>> import fusedlr
        >>> p = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = FusedAdamW([p], lr=0.1, schedule=fusedlr.linear(total_steps=10))
        >>> optimizer.extend_schedule(total_steps=20)
        >>> optimizer.param_groups[0]["schedule"]
        linear(total_steps=20)
        """
        self._adopt_groups()
        own = [group["schedule"] for group in self.param_groups if group.get("schedule") is not None]
        if not own:
            raise ValueError("no group has a schedule that could be extended")
        now = max(schedule.total_steps or 0 for schedule in own)
        if total_steps < now:
            raise ValueError(f"total_steps={total_steps} is less than the schedule's {now}")
        longer = iter([schedule.with_total_steps(total_steps) for schedule in own])
        for group in self.param_groups:
            if group.get("schedule") is not None:
                set_quietly(group, "schedule", next(longer))
        if self._settings["schedule"] is not None:
            self._settings["schedule"] = self._settings["schedule"].with_total_steps(total_steps)
        self._notes.changed = True
        # a rate that was used stays on show; one to come is another now
        if list(self._shown) == list(self._mirror.k):
            self._show(self._shown)

    def coming_grad_norm(self) -> Tensor:
        """The gradient norm of the next step: a 0-dim view on the device, to be read after that step.

        For trainers that ask for the norm before the step and log it afterwards. Waits for nothing; joint
        groups only. nan while no step has needed a norm.
        """
        prepared = self._prepared
        self._place_counters(prepared.backend if prepared is not None else self._backend(warn=False))
        return self._counters.grad_norm[0]

    def _warn_absolute(self) -> None:
        """An absolute floor is relative to `lr`; where no group has that rate, it is not what was meant."""
        lr, schedule = self.defaults["lr"], self._settings["schedule"]
        if schedule is None or schedule.resolve(lr) is schedule:
            return
        peaks = [group["initial_lr"] for group in self.param_groups if group.get("schedule") is not None]
        if lr not in peaks:
            warn(
                f"{schedule!r} names a learning rate, which is taken relative to lr={lr:g}, but the groups' "
                f"peaks are {', '.join(f'{peak:g}' for peak in peaks)}: pass lr= to the optimizer too"
            )

    def _adopt_groups(self) -> None:
        """Wrap groups that were put into `param_groups` from outside, and count the steps of new ones."""
        for i, group in enumerate(self.param_groups):
            if isinstance(group, ParamGroup) and group.belongs_to(self._notes):
                continue
            self.param_groups[i] = wrapped = ParamGroup(group, self._notes)
            if isinstance(wrapped.get("schedule"), (list, tuple)):
                set_quietly(wrapped, "schedule", Schedule.from_numbers(wrapped["schedule"]))
            schedule = wrapped.get("schedule")
            if schedule is not None and "initial_lr" in wrapped and i < len(self._shown):
                # a plain dict does not tell who wrote; a rate that is not ours did come from outside
                ours = {schedule.lr_at(k, wrapped["initial_lr"]) for k in (self._shown[i], self._mirror.k[i])}
                if isinstance(wrapped["lr"], Tensor) or wrapped["lr"] not in ours:
                    self._notes.writes.add(id(wrapped))
        if len(self.param_groups) != len(self._mirror.k):
            k = (self._read_k() + [0] * len(self.param_groups))[: len(self.param_groups)]
            self._resize_counters(len(k))
            self._place_k(k)
            self._shown = (self._shown + [0] * len(k))[: len(k)]
        for group in self.param_groups:
            # a schedule assigned to a running group is resolved as one given at the start
            if group.get("schedule") is not None:
                check_schedule(group["schedule"])
                set_quietly(group, "schedule", group["schedule"].resolve(self.defaults["lr"]))
                if "initial_lr" not in group:
                    set_quietly(group, "initial_lr", float(group["lr"]))

    # --- what the host shows

    @property
    @eager
    def scheduler(self) -> ScheduleView:
        """A view of the schedule with the face of an `LRScheduler`, for trainers and loggers."""
        view = self._view() if self._view is not None else None
        if view is None:
            view = ScheduleView(self)
            # weak: the view holds the optimizer, and a cycle would keep its memory until the next collection
            self._view = weakref.ref(view)
        return view

    @eager
    def metrics(self) -> dict[str, Tensor]:
        """What the last step used, as new tensors on the device; no copy to the host.

        Returns:
            `lr` and `step` (updates made) of shape (groups,); `grad_norm` (nan if none was needed), `coef`
            and `skipped` (steps) 0-dim, or of shape (groups,) when groups are independent.
        """
        c = self._counters
        shared = {"grad_norm": c.grad_norm, "coef": c.coef, "skipped": c.skipped}
        if self._joint:
            shared = {name: value[0] for name, value in shared.items()}
        return {name: value.clone() for name, value in {"lr": c.lr, **shared, "step": c.k}.items()}

    @eager
    def last_metrics(self) -> dict[str, Any]:
        """`metrics` in plain numbers, as of the last copy that has reached the host; starts the next copy.

        Never waits: on a GPU these are the numbers as they stood at an earlier call, or at an earlier
        `scheduler.step()`; called every step they are a few steps old. On the CPU they are current.
        """
        self._mirror.refresh()
        values = self._mirror.metrics
        if self._joint:
            return {k: list(v) if k in ("lr", "step") else v[0] for k, v in values.items()}
        return {name: list(value) for name, value in values.items()}

    def _show(self, k: list[int]) -> None:
        """Put the rate of step `k` of every scheduled group into `group["lr"]`."""
        self._shown = list(k)
        for step, group in zip(k, self.param_groups, strict=False):
            if group.get("schedule") is not None:
                rate = group["schedule"].lr_at(step, group["initial_lr"])
                set_quietly(group, "lr", rate)
                self._notes.writes.discard(id(group))

    def _show_next(self) -> None:
        self._adopt_groups()
        self._mirror.refresh()
        self._show(self._mirror.k)

    def _shown_step(self) -> int:
        return self._shown[0]

    # --- counters

    def _trainable(self) -> Iterable[Tensor]:
        return trainable(self.param_groups)

    def _device(self, default: torch.device) -> torch.device:
        # a model on the meta device is filled in later
        return next((p.device for p in self._trainable() if p.device.type != "meta"), default)

    def _place_counters(self, backend: backends.Backend) -> None:
        """Keep the counters on the device of the first trainable parameter, and as the backend counts."""
        device = self._device(self._counters.k.device)
        if device != self._counters.k.device:
            old, k = self._counters, self._read_k()
            self._counters = Counters.zeros(len(k), device)
            self._prepared = None
            self._counters.counts[1:] = old.counts[1:].to(device)
            self._place_k(k)
        if backend.single:
            self._counters.use_fp32()

    def _resize_counters(self, groups: int) -> None:
        old, device = self._counters, self._counters.k.device
        self._counters = Counters.zeros(groups, device)
        # what it would repeat counts in the old ones
        self._prepared = None
        # what a backend keeps for an optimizer, and captured graphs read, lives as long as this does
        self._counters.math = old.math
        kept = min(groups, old.k.numel())
        self._counters.counts[1:, :kept] = old.counts[1:, :kept]
        self._counters.used[:, :kept] = old.used[:, :kept]

    def _place_k(self, k: list[int]) -> None:
        self._counters.k.copy_(torch.tensor(k, device="cpu"))
        self._mirror.attach(self._counters)

    def _read_k(self) -> list[int]:
        """Updates made per group, from the device (waits for it)."""
        self._mirror.sync()
        k = list(self._mirror.k)
        # the host ran ahead by the steps that were skipped
        if any(shown > now for shown, now in zip(self._shown, k, strict=False)):
            self._show(k)
        return k

    def _set_k(self, k: list[int]) -> None:
        """Continue every group's schedule here; a checkpoint loaded before the next step keeps it so."""
        self._k_loaded = list(k)
        self._place_k(k)
        self._show(k)

    # --- state

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state dict; groups with a schedule also carry it in plain numbers, with their step count.

        Reads the counters from the device.
        """
        self._adopt_groups()
        latest = checkpoint.max_steps(self.param_groups, self.state, joint=self._joint)
        for group, k, t in zip(self.param_groups, self._read_k(), latest, strict=True):
            if group.get("schedule") is not None:
                set_quietly(group, "k", k)
                set_quietly(group, "k_at_step", t)
        # post-hooks are to see what is saved, so they run on the finished dict
        hooks, self._optimizer_state_dict_post_hooks = self._optimizer_state_dict_post_hooks, OrderedDict()
        try:
            state_dict = super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = hooks
        for packed, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            if isinstance(packed.get("schedule"), Schedule):
                packed["schedule"] = packed["schedule"].to_numbers()
            # a file of torch's may have it, and it would not load into stock AdamW on the CPU
            packed["capturable"] = False
            # stock AdamW then keeps its step counts on the device
            if any(p.device.type == "cuda" for p in group["params"]):
                packed["fused"] = True
        for hook in hooks.values():
            result = hook(self, state_dict)
            if result is not None:
                state_dict = result
        return state_dict

    @eager
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of `torch.optim.AdamW`, in the middle of a run too.

        Hyperparameters and the peak come from the file, schedules from this optimizer; a disagreement is
        reported. Tensors are copied, never narrowed.

        Raises:
            ValueError: the file does not fit; says what. Nothing has been changed then.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            if result is not None:
                state_dict = result
        self._adopt_groups()
        by_id = checkpoint.check(self, state_dict)
        k = checkpoint.load_k(self, state_dict)
        checkpoint.report_disagreement(self, state_dict["param_groups"])
        groups = checkpoint.load_groups(self, state_dict["param_groups"])
        state = checkpoint.load_state(self, state_dict["state"], by_id)
        loaded = type(self.state)(dict)
        loaded.update(state)
        self.__setstate__({"state": loaded, "param_groups": groups})
        # a scheduler's state loaded just before wins, once: the next file is another one
        self._place_k(k if self._k_loaded is None else self._k_loaded)
        self._k_loaded = None
        self._show(self._mirror.k)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """State for pickle and deepcopy; reads the counters from the device."""
        return {
            **super().__getstate__(),
            "_settings": self._settings,
            "_k": self._read_k(),
            "_skipped": self._counters.skipped.tolist(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Adopt a state; called by pickle and, with groups and state alone, by loaders."""
        state = dict(state)
        k, skipped = state.pop("_k", None), state.pop("_skipped", None)
        super().__setstate__(state)
        self.__dict__.setdefault("_notes", Notes()).writes.clear()
        if "_plan" in self.__dict__:
            # what was packed belongs to the state that is being replaced
            self._plan.forget()
            self._prepared = None
        self.param_groups = [ParamGroup(group, self._notes) for group in self.param_groups]
        for group in self.param_groups:
            for name, default in self.defaults.items():
                if name != "lr" and name not in group:
                    group[name] = default
            if isinstance(group.get("schedule"), Schedule):
                set_quietly(group, "k", group.get("k", 0))
                set_quietly(group, "k_at_step", group.get("k_at_step", 0))
        if k is not None:
            self._start(k, skipped)

    # --- settings

    @property
    def max_grad_norm(self) -> float | None:
        """Norm that gradients are clipped to; may be changed while training."""
        return self._settings["max_grad_norm"]

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._settings["max_grad_norm"] = arguments.max_grad_norm(value)
        self._notes.changed = True

    @property
    def nonfinite(self) -> str:
        """`"skip"` or `"propagate"`."""
        return self._nonfinite(self.max_grad_norm)

    def _nonfinite(self, max_grad_norm: float | None) -> str:
        default = "skip" if max_grad_norm is not None else "propagate"
        return self._settings["nonfinite"] or default

    @property
    def groups(self) -> str:
        """`"joint"` or `"independent"`."""
        return self._settings["groups"]

    @property
    def _joint(self) -> bool:
        return self._settings["groups"] == "joint"

    @property
    def backend(self) -> str:
        """Name of the backend that runs the step."""
        return self._backend(warn=False).name

    def _backend(self, warn: bool = True) -> backends.Backend:
        devices = {p.device for p in self._trainable()}
        backend = backends.choose(self._settings["backend"], devices)
        fallback = backend.name == "reference" and backends.requested(self._settings["backend"])[0] == "auto"
        if warn and fallback and not self._warned_fallback:
            self._warned_fallback = True
            backends.warn_fallback(devices)
        return backend

    def __repr__(self) -> str:
        """torch's listing of the groups, after one line on what is fused."""
        fused = {"backend": self.backend, "max_grad_norm": self.max_grad_norm, "nonfinite": self.nonfinite}
        line = ", ".join(f"{name}={value}" for name, value in {**fused, "groups": self.groups}.items())
        return f"{super().__repr__()}\n({line})"
