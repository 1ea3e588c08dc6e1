"""`FusedAdamW` as torch sees it: arguments, step, zero_grad, settings."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from fusedlr import arguments, backends, checkpoint
from fusedlr.counts import Counts, UpdateCounts
from fusedlr.eager import eager
from fusedlr.groups import (
    Notes,
    Options,
    ParamGroup,
    check_rates,
    give_schedule,
    has_schedule,
    lengthen,
    skips_nonfinite,
    warn_absolute,
    warn_assigned,
)
from fusedlr.reference import Signals, is_fake
from fusedlr.schedule import Schedule, check_schedule
from fusedlr.scheduler import ScheduleView
from fusedlr.step import (
    Plan,
    allocate,
    check_capture,
    device_of,
    devices_of,
    is_allocated,
    measure,
    only_allocates,
    prepare,
    warn_parts,
    warn_without_gradients,
)

_NO_SIGNALS = Signals()
_ALLOCATE_BEFORE_CAPTURE = (
    "make one step outside the CUDA graph before capturing it: the state is allocated there"
)
_NO_NORM_IN_CAPTURE = (
    "grad_norm() cannot be captured in a CUDA graph: a captured step computes the norm, which metrics() has"
)


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

    param_groups: list[Any]  # of `ParamGroup`, but for dicts from outside that the next step wraps

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
        if arguments.flag("differentiable", differentiable):
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
            "amp_scaling": arguments.flag("amp_scaling", amp_scaling),
            "state_dtype": state_dtype,
            "backend": backends.check_name(backend),
        }
        self._notes = Notes()
        defaults = {
            "lr": lr,
            "betas": betas,
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
        defaults.update(arguments.hyperparameters(defaults))
        super().__init__(params, defaults)
        self._start(k=[0] * len(self.param_groups))
        self._choose_backend(warn=False)
        warn_absolute(self.param_groups, self._settings["schedule"], self.defaults["lr"])

    def _start(self, k: list[int], skipped: list[int] | None = None) -> None:
        """Make everything that is not part of the state: plan, counters, what the host knows."""
        if self._settings["amp_scaling"]:
            self._step_supports_amp_scaling = True
        # one step at a time, whichever threads make them
        self._lock = threading.RLock()
        self._plan: Plan | None = None
        # whose gradients `grad_norm` has just measured
        self._measured: Plan | None = None
        self._options: Options | None = None
        self._updates = UpdateCounts()
        self._view: weakref.ref[ScheduleView] | None = None
        self._warned_assigned = self._warned_fallback = False
        self._warned_parts = self._warned_gradients = False
        device = device_of(self.param_groups, torch.device("cpu"))
        self._counts = Counts(
            self.param_groups, self._notes, self.defaults, device, k, skipped, joint=self._joint
        )

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
        hooked = (
            torch.autograd._profiler_enabled()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
        )
        with self._hooks(closure) if hooked else nullcontext(closure) as closure:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            with self._lock:
                signals, plan, before = self._signals(), self._plan, self._counts.k
                measured, self._measured = self._measured, None
                try:
                    if plan is not None and not plan.watch.unchanged(self.param_groups, self.state):
                        plan = None
                    if plan is None or self._notes.changed:
                        plan = self._renewed(plan)
                    if plan is None:
                        # the state has been allocated, which was all that this step was for
                        return loss
                    if self._is_capturing():
                        check_capture(self.param_groups)
                        # every replay has gradients of its own
                        measured = None
                    if measured is plan and signals is _NO_SIGNALS and plan.watch.same_gradients():
                        made = plan.stepper.update(signals)
                    else:
                        made = plan.stepper.step(signals)
                    self._after_step(plan, made)
                except BaseException:
                    # an interrupt may come when the step is made and the host does not know of it
                    made = self._counts.recover(before)
                    if made is not None and plan is not None:
                        self._after_step(plan, made)
                    raise
                finally:
                    if self._plan is not None:
                        self._plan.watch.release()
        return loss

    # tells torch.optim.Optimizer that the hooks are dispatched here
    step.hooked = True  # type: ignore[attr-defined]

    @contextmanager
    def _hooks(self, closure: Callable[[], Any] | None) -> Iterator[Callable[[], Any] | None]:
        """Run step hooks around a step, in a profiler range; gives the closure that they leave."""
        with torch.autograd.profiler.record_function(f"Optimizer.step#{type(self).__name__}.step"):
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
            yield args[1] if len(args) > 1 else kwargs.get("closure")
            # where torch's profilers put their mark
            self._optimizer_step_code()
            after = self._optimizer_step_post_hooks, torch_optimizer._global_optimizer_post_hooks
            for hook in chain.from_iterable(hooks.values() for hooks in after if hooks):
                hook(self, args, kwargs)

    def _signals(self) -> Signals:
        scale, inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is None and inf is None:
            return _NO_SIGNALS
        return Signals(arguments.one_element("grad_scale", scale), arguments.one_element("found_inf", inf))

    def _renewed(self, plan: Plan | None, *, may_only_allocate: bool = True) -> Plan | None:
        """A plan for what is there now: the given one with other options if it can take them, or a new one.

        None if the step was only to allocate the state.
        """
        self._counts.adopt(self.param_groups)
        if plan is None or not plan.fits(self.param_groups, self._counts.counters):
            return self._prepare(may_only_allocate=may_only_allocate)
        self._options = options = self._new_options()
        plan.stepper.assign(options.groups, options.scopes)
        return plan

    def _prepare(self, *, may_only_allocate: bool = True) -> Plan | None:
        """Check everything and make the plan; None if the step was only to allocate the state."""
        before, self._plan = self._plan, None
        if before is not None and not self._warned_parts:
            self._warned_parts = warn_parts(before, self.param_groups)
        backend = self._choose_backend()
        # what is not a number raises here, before any group has been updated
        options = self._new_options()
        if not self._warned_gradients:
            self._warned_gradients = warn_without_gradients(self.param_groups)
        arguments = self.param_groups, self.state, options, self._updates, self._settings["state_dtype"]
        if may_only_allocate and only_allocates(self.param_groups, self.state, self._notes):
            allocate(*arguments)
            self._notes.clear()
            self._notes.changed = True
            return None
        groups, state, _, updates, state_dtype = arguments
        if self._is_capturing() and not is_allocated(groups, state, updates, state_dtype):
            # tensors allocated while a CUDA graph is captured have no values until it is replayed
            raise RuntimeError(_ALLOCATE_BEFORE_CAPTURE)
        self._plan = prepare(groups, state, options, self._counts, updates, backend, state_dtype)
        self._options = options
        return self._plan

    def _new_options(self) -> Options:
        options = Options.of(
            self.param_groups,
            self._notes,
            joint=self._joint,
            max_grad_norm=self.max_grad_norm,
            nonfinite=self._settings["nonfinite"],
        )
        # taken anew for the next step, if a schedule then takes over again or a value may change in place
        self._notes.changed = bool(options.overruled) or not options.kept
        return options

    def _after_step(self, plan: Plan, made: Any) -> None:
        """Show the rate just used in `group["lr"]` and count the step on the host."""
        counts, options = self._counts, self._options
        assert options is not None
        for i, step in enumerate(options.groups):
            if step.schedule is not None:
                rate = made.lr[i] if made is not None else step.schedule.lr_at(counts.k[i], step.peak)
                self.param_groups[i].show(rate)
        for i in options.overruled:
            self.param_groups[i].shown_lr = None
            if not self._warned_assigned:
                self._warned_assigned = warn_assigned(i, plan.groups[i], counts.k[i])
        self._notes.clear()
        counts.made(made, () if made is not None else plan.stepper.active())

    def _is_capturing(self) -> bool:
        """Whether the step becomes part of a CUDA graph."""
        k = self._counts.counters.k
        return k.is_cuda and not is_fake(k) and torch.cuda.is_current_stream_capturing()

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
                # the multi-tensor zero refuses views that negate or conjugate when they are read
                if p.grad.layout == torch.strided and not (p.grad.is_neg() or p.grad.is_conj()):
                    grads.append(p.grad)
                else:
                    p.grad.zero_()
        if grads:
            torch._foreach_zero_(grads)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its schedule starts at step 0, or with `"join": True` where the run is now.

        The dict passed is copied.

        Raises:
            ValueError: an option is out of range or parameters are duplicate. Nothing has been added then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = {**param_group, **getattr(param_group, "own", {})}
        # counts of another optimizer's run, if the dict came from one
        group.pop("k", None), group.pop("k_at_step", None)
        join = group.pop("join", False)
        arguments.choice("join", join, (True, False))
        if isinstance(group.get("params"), Iterable) and not isinstance(group["params"], (Tensor, set)):
            group["params"] = list(group["params"])
            arguments.duplicates(group["params"])
        checked = arguments.hyperparameters({**self.defaults, **group})
        group.update((name, value) for name, value in checked.items() if name in group)
        if "max_grad_norm" in group:
            if self._joint:
                raise ValueError(
                    f"max_grad_norm={group['max_grad_norm']!r} in a group needs groups='independent': "
                    "joint groups share one norm"
                )
            group["max_grad_norm"] = arguments.max_grad_norm(group["max_grad_norm"])
        give_schedule(group, self._settings["schedule"], self.defaults["lr"])
        super().add_param_group(group)
        self.param_groups[-1] = added = ParamGroup(group, self._notes)
        if has_schedule(added):
            # writing this rate back assigns nothing
            added.show(added["lr"])
        # torch's constructor adds the first groups
        if "_counts" in self.__dict__:
            self._notes.changed = True
            self._counts.adopt(self.param_groups)
            if join:
                self.param_groups[-1]["k"] = max(self._counts.read(self.param_groups))

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
        self._counts.adopt(self.param_groups)
        peaks = [group.get("initial_lr", group["lr"]) for group in self.param_groups]
        check_rates(*peaks, self.defaults["lr"])
        resolved = schedule.resolve(self.defaults["lr"])
        for group, peak in zip(self.param_groups, peaks, strict=True):
            group.set_quietly("schedule", resolved)
            group.set_quietly("initial_lr", float(peak))
        self._settings["schedule"] = schedule
        self._notes.changed = True
        self._counts.go_to(self.param_groups, [0] * len(self.param_groups))
        self._counts.k_loaded = None
        warn_absolute(self.param_groups, schedule, self.defaults["lr"])

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
        self._counts.adopt(self.param_groups)
        self._settings["schedule"] = lengthen(self.param_groups, self._settings["schedule"], total_steps)
        self._notes.changed = True
        # a rate that shows the next step is another one now; a rate that was used stays
        counts = self._counts
        if list(counts.shown) == list(counts.k):
            counts.show(self.param_groups, counts.shown)

    @eager
    def grad_norm(self, grad_scale: Tensor | float | None = None) -> Tensor:
        """L2 norm of the gradients as they are now, not clipped; computed on the device, waits for nothing.

        The next `step()` takes it over instead of computing it again if every gradient is still the same
        tensor and has not been written to since. A write that torch does not count (through `.data`, or by
        replaying a CUDA graph) is not seen. Under a GradScaler the step computes its own.

        Args:
            grad_scale: what the loss was multiplied by, a number or a tensor of one element; the norm is
                that of the gradients divided by it. None where they are not scaled, or unscaled already.

        Returns:
            A new tensor: 0-dim, of shape (groups,) when groups are independent. 0 without gradients.

        Raises:
            RuntimeError: a gradient cannot be used; names the parameter. Or a CUDA graph is being captured.
            ValueError: `grad_scale` has more than one element.

        >>> import fusedlr
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fusedlr.FusedAdamW([p], lr=0.1, max_grad_norm=1.0)
        >>> p.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.grad_norm().item()
        5.0
        """
        scale = arguments.one_element("grad_scale", grad_scale)
        with self._lock:
            if self._is_capturing():
                raise RuntimeError(_NO_NORM_IN_CAPTURE)
            try:
                plan = self._plan
                if plan is not None and not plan.watch.unchanged(self.param_groups, self.state):
                    plan = None
                if plan is None or self._notes.changed:
                    plan = self._renewed(plan, may_only_allocate=False)
                assert plan is not None and self._options is not None
                measure(plan, self._options, Signals(scale))
                plan.watch.remember_gradients()
            finally:
                if self._plan is not None:
                    self._plan.watch.release()
            self._measured = plan if scale is None and self._settings["amp_scaling"] else None
            norms = self._counts.counters.squares.sqrt()
        return norms[0] if self._joint else norms[: len(self.param_groups)]

    @property
    @eager
    def scheduler(self) -> ScheduleView:
        """A view of the schedule with the face of an `LRScheduler`, for trainers and loggers."""
        view = self._view() if self._view is not None else None
        if view is None:
            view = ScheduleView(self, self._counts)
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
        c = self._counts.counters
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
        self._counts.refresh()
        values = self._counts.metrics
        if self._joint:
            return {k: list(v) if k in ("lr", "step") else v[0] for k, v in values.items()}
        return {name: list(value) for name, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state dict; groups with a schedule also carry it in plain numbers, with their step count.

        Reads the counters from the device.
        """
        counts = self._counts
        counts.adopt(self.param_groups)
        k = counts.read(self.param_groups)
        skipped = counts.read_skipped()
        own = checkpoint.own_state(self.param_groups, self.state, k, skipped, joint=self._joint)
        # post-hooks are to see what is saved, so they run on the finished dict
        hooks, self._optimizer_state_dict_post_hooks = self._optimizer_state_dict_post_hooks, OrderedDict()
        try:
            state_dict = super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = hooks
        checkpoint.complete(state_dict, self.param_groups, own)
        for hook in hooks.values():
            result = hook(self, state_dict)
            if result is not None:
                state_dict = result
        return state_dict

    @eager
    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> Any:
        """Load a state dict of this class or of `torch.optim.AdamW`, in the middle of a run too.

        Hyperparameters and the peak come from the file, schedules from this optimizer; a disagreement is
        reported. Tensors are copied, never narrowed.

        Args:
            state_dict: what `state_dict` returned, or that of `torch.optim.AdamW`.
            strict: False finds parameters by name, takes the state that fits, and leaves groups and their
                options as they are; both optimizers must have been built from named parameters.

        Returns:
            None, or with `strict=False` the names in `missing_keys` and `unexpected_keys`.

        Raises:
            ValueError: the file does not fit; says what. Nothing has been changed then.
        """
        if isinstance(state_dict, dict):
            state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            if result is not None:
                state_dict = result
        counts, missing = self._counts, None
        counts.adopt(self.param_groups)
        if strict:
            loaded = checkpoint.read(
                self.param_groups, state_dict, joint=self._joint, other_own=counts.own_loaded
            )
        else:
            k = counts.read(self.param_groups)
            loaded, missing = checkpoint.read_matching(self.param_groups, state_dict, k, joint=self._joint)
        # a warning that is an error is raised before anything is changed
        checkpoint.report(loaded.disagreements)
        self._adopt(loaded, strict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
        return missing

    def _adopt(self, loaded: checkpoint.Loaded, strict: bool) -> None:
        """Take what has been loaded."""
        counts, state = self._counts, type(self.state)(dict)
        if not strict:
            state.update(self.state)
        state.update(checkpoint.apply_state(loaded, self.state, self._settings["state_dtype"]))
        groups = loaded.groups if strict else self.param_groups
        self.__setstate__({"state": state, "param_groups": groups})
        counts.adopt(self.param_groups)
        # a scheduler's state loaded just before wins, once: the next file is another one
        counts.go_to(self.param_groups, loaded.k if counts.k_loaded is None else counts.k_loaded)
        counts.k_loaded = counts.own_loaded = None
        if loaded.skipped is not None:
            counts.place_skipped(loaded.skipped)

    def __getstate__(self) -> dict[str, Any]:
        """State for pickle and deepcopy; reads the counters from the device."""
        self._counts.adopt(self.param_groups)
        return {
            **super().__getstate__(),
            "_settings": self._settings,
            "_own": [dict(group.own) for group in self.param_groups],
            "_k": self._counts.read(self.param_groups),
            "_skipped": self._counts.read_skipped(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Adopt a state; called by pickle and, with groups and state alone, by loaders."""
        state = dict(state)
        k, skipped, own = state.pop("_k", None), state.pop("_skipped", None), state.pop("_own", None)
        super().__setstate__(state)
        self.__dict__.setdefault("_notes", Notes()).clear()
        # the plan belongs to the state that is being replaced
        self._plan = None
        self._notes.changed = True
        own = own or [getattr(group, "own", None) for group in self.param_groups]
        self.param_groups = [
            ParamGroup(group, self._notes, kept) for group, kept in zip(self.param_groups, own, strict=True)
        ]
        for group in self.param_groups:
            for name, default in self.defaults.items():
                if name != "lr" and name not in group:
                    group[name] = default
        if k is not None:
            self._start(k, skipped)

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
        skips = skips_nonfinite(self._settings["nonfinite"], self.max_grad_norm)
        return "skip" if skips else "propagate"

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
        return self._choose_backend(warn=False).name

    def _choose_backend(self, warn: bool = True) -> backends.Backend:
        if any(is_fake(p) for group in self.param_groups for p in group["params"]):
            # kernels need addresses
            return backends.BACKENDS["reference"]
        devices = devices_of(self.param_groups)
        backend = backends.choose(self._settings["backend"], devices)
        fallback = backend.name == "reference" and backends.requested(self._settings["backend"])[0] == "auto"
        if warn and fallback and not self._warned_fallback:
            self._warned_fallback = True
            backends.warn_fallback(devices)
        return backend

    def __repr__(self) -> str:
        """torch's listing of the groups, then what is fused, and the schedules that groups do not list."""
        fused = {"backend": self.backend, "max_grad_norm": self.max_grad_norm, "nonfinite": self.nonfinite}
        line = ", ".join(f"{name}={value}" for name, value in {**fused, "groups": self.groups}.items())
        schedules = [
            f"group {i}: {group['schedule']!r} of peak {group['initial_lr']:g}"
            for i, group in enumerate(self.param_groups)
            if has_schedule(group)
        ]
        return "\n".join([super().__repr__(), f"({line})", *schedules])
