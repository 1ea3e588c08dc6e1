"""`FusedAdamW` as torch sees it: arguments, step, zero_grad, settings."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedlr import arguments, backends, checkpoint, hooks, live, recorder, scope_state
from fusedlr.columns import STATE
from fusedlr.counts import Counts
from fusedlr.eager import eager
from fusedlr.groups import (
    Notes,
    ParamGroup,
    ScopeKey,
    begin,
    checked_group,
    chosen_scopes,
    has_schedule,
    index_of_scope,
    lengthen,
    scope_keys,
    scopes_of,
    skips_nonfinite,
    warn_absolute,
)
from fusedlr.guard import ZClip
from fusedlr.guard import max_grad_norm as checked_limit
from fusedlr.kept import Kept
from fusedlr.latest import Latest
from fusedlr.planner import NO_SIGNALS, Planner, choose_backend
from fusedlr.record import Record
from fusedlr.recorded import Recording
from fusedlr.reference import Signals, fp32_value, local
from fusedlr.schedule import Schedule, check_schedule
from fusedlr.scheduler import ScheduleView
from fusedlr.sharded import spread_like
from fusedlr.step import device_of


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
            its own `lr` (peak), `betas`, `eps`, `weight_decay`, `amsgrad`, `maximize`, `schedule`. Groups
            with the same `scope`, a name, are an optimizer of their own, as one adapter of several is: they
            are normed, clipped, skipped and counted together, and may have their own `max_grad_norm` and
            `nonfinite`.
        lr: peak learning rate, >= 0. Without a schedule may be a tensor of one element, read on its device.
        betas: decay rates of the moments, in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled decay, >= 0.
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018).
        schedule: a `fusedlr.Schedule`; None is a constant rate that outside schedulers may drive.
        max_grad_norm: clip to this L2 norm of all (unscaled) gradients, > 0; None does not clip. A
            `fusedlr.ZClip` clips or skips norms far above those of the steps before.
        nonfinite: `"skip"` leaves everything as it was when a gradient is inf or nan; `"propagate"` is torch.
            Default: skip when `max_grad_norm` is set.
        groups: of those without a scope. `"joint"`: one norm and one decision to skip for all, as torch.
            `"independent"`: each is a scope of its own, with its own `max_grad_norm` and `nonfinite`, and its
            schedule advances only when it had a gradient.
        amp_scaling: take part in `torch.amp.GradScaler`'s protocol for fused optimizers.
        state_dtype: None keeps fp32 moments for bf16 and fp16 parameters; `"param"` keeps them in the
            parameter's dtype, as torch.
        master_weights: train bf16 and fp16 parameters exactly as fp32 ones on the same gradients: what they
            lack of their fp32 values is kept in the state, 2 bytes per bf16 and 4 per fp16 parameter. See
            `master_parameters`.
        backend: `"auto"` or a name from `fusedlr.backends`; a backend that cannot run raises and says why.
        process_group: processes that hold different parts of the model in plain tensors, as pipeline stages
            do: their norms are added. Not needed for DTensors, whose meshes say over which processes to add.
            A copy or a pickle of the optimizer is without it.
        record: a `fusedlr.Record` has every step write down what it used and did, for `record`.
        maximize: climb instead of descend.
        foreach: accepted for torch's signature; without effect, as are the next two.
        capturable: see `foreach`.
        fused: see `foreach`.
        differentiable: must be False.

    Raises:
        ValueError: an argument is out of range, or parameters are duplicate.
        TypeError: `schedule` is not a `Schedule`, or `record` not a `Record`.
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
        max_grad_norm: float | ZClip | None = None,
        nonfinite: str | None = None,
        groups: str = "joint",
        amp_scaling: bool = True,
        state_dtype: str | None = None,
        master_weights: bool = False,
        backend: str = "auto",
        process_group: Any = None,
        record: Record | None = None,
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
        if record is not None and not isinstance(record, Record):
            raise TypeError(f"record={arguments.shown(record)} is not a fusedlr.Record")
        self._settings: dict[str, Any] = {
            "schedule": schedule,
            "max_grad_norm": checked_limit(max_grad_norm),
            "nonfinite": nonfinite,
            "groups": groups,
            "amp_scaling": arguments.flag("amp_scaling", amp_scaling),
            "kept": Kept(state_dtype, arguments.flag("master_weights", master_weights)),
            "backend": backends.check_name(backend),
            "process_group": process_group,
            "record": record,
            "only": None,
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
        choose_backend(self.param_groups, backend)
        warn_absolute(self.param_groups, self._settings["schedule"], self.defaults["lr"])

    def _start(
        self, k: list[int], skipped: list[int] | None = None, norms: list[list[float]] | None = None
    ) -> None:
        """Make everything that is not part of the state: plan, counters, what the host knows."""
        if self._settings["amp_scaling"]:
            self._step_supports_amp_scaling = True
        # one step at a time, whichever threads make them
        self._lock = threading.RLock()
        self._view: weakref.ref[ScheduleView] | None = None
        device = device_of(self.param_groups, torch.device("cpu"))
        begun = self.param_groups, self._notes, self.defaults, device, k, skipped
        self._counts = Counts(*begun, joint=self._joint, record=self.recorded)
        if norms is not None:
            self._counts.place_norms(norms)
        self._planner = Planner(self._settings, self._notes, self._counts)
        self._latest = Latest()

    @eager
    def step(self, closure: Callable[[], Any] | None = None, *, only: Any = None) -> Any:
        """Unscale, clip, evaluate the schedule, update, count. Never copies anything to the host on a GPU.

        Args:
            closure: reevaluates the model and returns the loss; it runs before gradients are read.
            only: scopes that may make the step, as `scopes` calls them; nothing moves in the others, and none
                of their gradients is touched. Or a bool tensor of shape (scopes,), which is read on its
                device: a captured step follows it at every replay. None: those of the attribute `only`, all
                if that is None too.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a gradient cannot be used; names the parameter. Nothing has been changed then.
            ValueError: `only` names a scope that there is not.

        >>> import fusedlr
        >>> a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
        >>> groups = [{"params": [a], "scope": "first"}, {"params": [b], "scope": "second"}]
        >>> optimizer = fusedlr.FusedAdamW(groups, lr=0.5, weight_decay=0)
        >>> a.grad, b.grad = torch.ones(3), torch.ones(3)
        >>> optimizer.step(only=["second"])
        >>> a.tolist(), b.round(decimals=3).tolist()
        ([1.0, 1.0, 1.0], [0.5, 0.5, 0.5])
        """
        if not hooks.wanted(self):
            return self._unhooked_step(closure, only)
        with hooks.around(self, closure, only) as (closure, only):
            return self._unhooked_step(closure, only)

    # tells torch.optim.Optimizer that the hooks are dispatched here
    step.hooked = True  # type: ignore[attr-defined]

    def _unhooked_step(self, closure: Callable[[], Any] | None, only: Any) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._lock:
            planner, before = self._planner, self._counts.k
            plan, groups = planner.plan, self.param_groups
            try:
                signals = self._signals(only)
                if plan is None or self._notes.changed or not plan.watch.unchanged(groups, self.state):
                    # None if this step was only to allocate the state
                    plan = planner.plan_for(groups, self.state, signals)
                if plan is not None:
                    run = plan.stepper.update if planner.is_measured(plan, signals) else plan.stepper.step
                    planner.made(plan, run(signals), signals)
            except BaseException:
                # an interrupt may come when the step is made and the host does not know of it
                made = self._counts.recover(before)
                if made is not None and plan is not None and planner.plan is plan:
                    planner.made(plan, made, signals)
                raise
            finally:
                planner.release()
        return loss

    def _signals(self, only: Any) -> Signals:
        scale, inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        only = self._settings["only"] if only is None else only
        if scale is None and inf is None and only is None:
            return NO_SIGNALS
        return Signals(
            arguments.one_element("grad_scale", scale),
            arguments.one_element("found_inf", inf),
            only=None if only is None else chosen_scopes(only, self.scopes),
        )

    @eager
    def zero_grad(self, set_to_none: bool = True, *, only: Any = None) -> None:
        """Reset gradients: to None, or to zero in place.

        `only`: the scopes whose gradients are reset; None: those of the attribute `only`, and all if that is
        None or a tensor.

        Raises:
            ValueError: `only` names a scope that there is not, or is a tensor, which would have to be waited
                for.
        """
        if isinstance(only, Tensor):
            raise ValueError(
                "zero_grad(only=...) takes the names of scopes, not a tensor: it would wait for it"
            )
        only = self._settings["only"] if only is None else only
        groups = self.param_groups
        if only is not None and not isinstance(only, Tensor):
            scopes, keys = self.scopes, scope_keys(groups, joint=self._joint)
            chosen = {key for key, one in zip(scopes, chosen_scopes(only, scopes), strict=True) if one}
            groups = [group for group, key in zip(groups, keys, strict=True) if key in chosen]
        grads = []
        for group in groups:
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

    @torch.no_grad()
    def master_parameters(self) -> Iterator[Tensor]:
        """What the parameters are in full, in the order of `param_groups`, to merge or save them exactly.

        With `master_weights`, of bf16 and fp16 parameters the fp32 values that steps compute with.

        Returns:
            An iterator over new tensors of the parameters' shapes, fp32, or fp64 for fp64 parameters; of
            DTensors they are DTensors.

        >>> import fusedlr
        >>> p = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> optimizer = fusedlr.FusedAdamW([p], lr=0.001, weight_decay=0, master_weights=True)
        >>> p.grad = torch.ones_like(p)
        >>> optimizer.step()
        >>> p.item(), round(next(optimizer.master_parameters()).item(), 4)
        (1.0, 0.999)
        """
        for group in self.param_groups:
            for p in group["params"]:
                # a DTensor does not take the bits of its parts for numbers of another dtype
                parts = {name: local(x) for name, x in (self.state.get(p) or {}).items() if name in STATE}
                yield spread_like(fp32_value(local(p), parts).clone(), p)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its schedule starts at step 0, or with `"join": True` where the run is now.

        A group that joins a scope that there is goes on where that scope is. The dict passed is copied.

        Raises:
            ValueError: an option is out of range or parameters are duplicate. Nothing has been added then.
        """
        # torch's constructor adds the first groups, when there is neither a lock nor counts
        with self.__dict__.get("_lock", nullcontext()):
            before = self.param_groups
            group = checked_group(
                param_group, self.defaults, self._settings["schedule"], before, joint=self._joint
            )
            join = group.pop("join", False)
            super().add_param_group(group)
            self.param_groups[-1] = added = ParamGroup(group, self._notes)
            if has_schedule(added):
                # writing this rate back assigns nothing
                added.show(added["lr"])
            if "_counts" in self.__dict__:
                self._notes.changed = True
                self._counts.adopt(self.param_groups)
                if join:
                    keys = scope_keys(self.param_groups, joint=self._joint)
                    of_scope = keys[-1] in keys[:-1]
                    k = zip(self._counts.read(self.param_groups), keys, strict=True)
                    self.param_groups[-1]["k"] = max(n for n, key in k if not of_scope or key == keys[-1])

    def start_schedule(self, schedule: Schedule) -> None:
        """Begin `schedule` at its first update, in every group; moments and their step counts stay.

        For trainers that learn the length of the run after they have built the optimizer. A group's peak is
        its `initial_lr`, its `lr` where it has none.

        Raises:
            TypeError: `schedule` is not a `Schedule`.
            ValueError: a group's lr is a tensor, or an absolute level is above the optimizer's `lr`.
        """
        self._counts.adopt(self.param_groups)
        begin(self.param_groups, schedule, self.defaults["lr"])
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
        self._counts.show_coming(self.param_groups)

    def cooldown(self, steps: int, shape: str = "1-sqrt", to: float = 0.0, *, only: Any = None) -> None:
        """Let the rate fall from where it is to `to` over the coming `steps` updates, and stay there.

        Update `i = 0, 1, ...` after the call gets `to + (r - to)*w(i/steps)`, where `r` is the rate that the
        next update would have had, `w(0) = 1` and `w(1) = 0`; see `Schedule.cooldown`. Skipped steps do not
        count. A second call starts from the rate that the first has come to. Checkpoints and copies carry it;
        a file without it that is loaded later takes it back. Groups that are added later, and a scope that is
        reset, begin the schedule as it was.

        Reads the step counts from the device, because the host may be ahead of them by skipped steps: on a
        GPU this waits. A captured CUDA graph follows at its next replay, as long as its tables have room.

        Args:
            steps: updates in the cooldown, at least 1.
            shape: `linear`, `cosine` or `1-sqrt` (arXiv:2405.18392).
            to: share of each group's peak, in [0, 1].
            only: scopes, as `scopes` calls them, whose groups cool down; None: every group with a schedule.

        Raises:
            ValueError: an argument is out of range, `only` names a scope that there is not, or a group that
                is meant has no schedule; names the group. Nothing has been changed then.

        >>> import fusedlr
        >>> p = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = FusedAdamW([p], lr=0.1, schedule=fusedlr.constant())
        >>> optimizer.cooldown(steps=4, shape="linear")
        >>> [optimizer.param_groups[0]["schedule"].lr_at(k, peak=0.1) for k in (0, 1, 4)]
        [0.1, 0.07500000000000001, 0.0]
        """
        self._change(only, lambda _: lambda schedule, k: schedule.cooldown(k, steps, shape, to))

    def rewarm(self, steps: int, peak: float | None = None, *, only: Any = None) -> None:
        """Let the rate go straight to `peak` over the coming `steps` updates, and stay there.

        Update `i = 0, 1, ...` after the call gets `r + (peak - r)*i/steps`, until it gets `peak`. What
        `cooldown` says of skips, checkpoints, waiting and graphs holds here too; `cancel_cooldown` takes it
        back. Peaks (`group["initial_lr"]`) stay as they are.

        Args:
            steps: updates until `peak`, at least 1.
            peak: rate of the first group that is meant; each other gets the same multiple of its own peak.
                None: every group its own peak.
            only: as in `cooldown`.

        Raises:
            ValueError: as `cooldown`, or the first group's peak is 0. Nothing has been changed then.

        >>> import fusedlr
        >>> p = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = FusedAdamW([p], lr=0.1, schedule=fusedlr.linear(total_steps=10))
        >>> optimizer.rewarm(steps=5, peak=0.2)
        >>> optimizer.param_groups[0]["schedule"]
        linear(total_steps=10).rewarm(k=0, steps=5, to=2.0)
        """

        def change(indices: list[int]) -> live.Change:
            to = live.level(self.param_groups, indices, peak)
            return lambda schedule, k: schedule.rewarm(k, steps, to)

        self._change(only, change)

    def cancel_cooldown(self, *, only: Any = None) -> None:
        """Go on as if `cooldown` and `rewarm` had never been called: the schedule as it was before the first.

        The step count stays, so the rate jumps to where that schedule stands now. Waits as `cooldown` does.

        Raises:
            ValueError: `only` names a scope that there is not, a group that is meant has no schedule, or none
                of them has been changed. Nothing has been changed then.

        >>> import fusedlr
        >>> p = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = FusedAdamW([p], lr=0.1, schedule=fusedlr.linear(total_steps=10))
        >>> optimizer.cooldown(steps=5)
        >>> optimizer.cancel_cooldown()
        >>> optimizer.param_groups[0]["schedule"]
        linear(total_steps=10)
        """

        def change(indices: list[int]) -> live.Change:
            if not any(self.param_groups[i]["schedule"].changes for i in indices):
                raise ValueError("no group has a cooldown that could be cancelled")
            return lambda schedule, k: schedule.original

        self._change(only, change)

    def _change(self, only: Any, change_of: Callable[[list[int]], live.Change]) -> None:
        """Change the schedules of the groups that are meant; `change_of` is told their indices."""
        groups = self.param_groups
        with self._lock:
            self._counts.adopt(groups)
            indices = live.chosen(groups, only, joint=self._joint)
            change = change_of(indices)
            new = live.changed(groups, indices, self._counts.read(groups), change)
            for i, schedule in new.items():
                groups[i].set_quietly("schedule", schedule)
            self._notes.changed = True
            self._counts.show_coming(groups)
            self._planner.follow(groups)

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
            A new tensor: 0-dim where all groups are one joint scope, else of shape (scopes,). 0 without
            gradients.

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
            norms = self._planner.measure(self.param_groups, self.state, scale)
        return norms[0] if self.scopes == (None,) else norms

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
            `lr` and `step` (updates made) of shape (groups,); `grad_norm` (nan if none was needed), `coef`,
            `limit` and `skipped` (steps) 0-dim where all groups are one joint scope, else of shape (scopes,).
            `limit` is what the norm was held to: `max_grad_norm`, inf without one; under a `ZClip` the limit
            of a spike, and the norm itself where it was none, both at most its `max_norm`.
        """
        c = self._counts.counters
        shared = {"grad_norm": c.grad_norm, "coef": c.coef, "limit": c.limit, "skipped": c.skipped}
        scopes = self._counts.scopes()
        first = list(scopes.values())
        if list(scopes) == [None]:
            shared = {name: value[0] for name, value in shared.items()}
        elif first != list(range(c.k.numel())):
            # one by one: an index list would be a copy from the host
            shared = {name: torch.stack([value[i] for i in first]) for name, value in shared.items()}
        return {name: value.clone() for name, value in {"lr": c.lr, **shared, "step": c.k}.items()}

    @eager
    def last_metrics(self) -> dict[str, Any]:
        """`metrics` in plain numbers, as of the last copy that has reached the host; starts the next copy.

        Never waits: on a GPU these are the numbers as they stood at an earlier call, or at an earlier
        `scheduler.step()`; called every step they are a few steps old. On the CPU they are current. Under
        `scopes` they have what the scopes are called. `nonfinite_tensor` and `nonfinite_step` name the first
        tensor whose gradient was inf or nan in the latest step that was skipped for one, and that step,
        counted from 0 with the skipped ones: None before there is one, lists where there are several scopes.
        Of shards, the process that holds the tensor names it.
        """
        self._counts.refresh()
        scopes = self._counts.scopes()
        joint, found = list(scopes) == [None], dict[str, Any]()
        for name, values in self._counts.metrics.items():
            if name in ("lr", "step"):
                found[name] = list(values)
            else:
                of_scopes = [values[i] for i in scopes.values()]
                found[name] = of_scopes[0] if joint else of_scopes
        nonfinite = [self._counts.nonfinite(key) for key in scopes]
        for i, name in enumerate(("nonfinite_tensor", "nonfinite_step")):
            of_scopes = [one[i] for one in nonfinite]
            found[name] = of_scopes[0] if joint else of_scopes
        return {**found, "scopes": tuple(scopes)}

    @eager
    def record(self) -> Recording:
        """What the last steps used and did, `record=fusedlr.Record(...)` asked for it: arrays of numpy, with
        the names of parameters, groups and scopes. `save` writes them for `fusedlr report`.

        Copies them from the device, which waits for it. Where tensors are spread over processes, norms of
        tensors are made of all parts: every process has to call it.

        Returns:
            A `Recording`, oldest step first; its table says what is in it.

        Raises:
            RuntimeError: the optimizer was made without `record`.
            ImportError: numpy is missing.
        """
        with self._lock:
            self._counts.adopt(self.param_groups)
            ring = self._counts.counters.ring
            if ring is None:
                raise RuntimeError("nothing was recorded: build the optimizer with record=fusedlr.Record()")
            layout = self._planner.layout(self.param_groups, self.state)
            return recorder.read(ring, self.param_groups, layout, joint=self._joint)

    @eager
    def last_update_ratios(self) -> dict[str, float]:
        """How much of themselves tensors moved in the last step, a few numbers for whoever logs them.

        Never waits: what `last_metrics` says of a GPU holds here too. Of shards, this process's part.

        Returns:
            By kind of tensor, `lora_A`, `lora_B`, `matrices` and `vectors`, the median of |change| /
            |parameter before|. Of several adapters each has its own, as `lora_A/first`. Without tensors that
            were 0 before the step. Empty without `record=Record(tensors=True)`.

        >>> import fusedlr
        >>> p = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = fusedlr.FusedAdamW([p], lr=0.5, weight_decay=0, record=fusedlr.Record())
        >>> p.grad = torch.ones(2, 2)
        >>> optimizer.step()
        >>> {kind: round(ratio, 4) for kind, ratio in optimizer.last_update_ratios().items()}
        {'matrices': 0.5}
        """
        with self._lock:
            ring = self._counts.counters.ring
            return {} if ring is None else self._latest.ratios(ring, self.param_groups)

    @property
    def recorded(self) -> Record | None:
        """What the steps record, `record` as the optimizer was given it."""
        return self._settings.get("record")

    def _read_record(self) -> dict[str, Any] | None:
        """What a file has of the recorded steps; None where none are."""
        if self.recorded is None:
            return None
        return self._counts.read_record(self._planner.layout(self.param_groups, self.state))

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state dict; groups with a schedule also carry it in plain numbers, with their step count.

        Reads the counters from the device.
        """
        # not while another thread makes a step
        with self._lock:
            counts = self._counts
            counts.adopt(self.param_groups)
            k = counts.read(self.param_groups)
            reached = k, counts.read_skipped(), counts.read_norms()
            own = checkpoint.own_state(self.param_groups, self.state, *reached, joint=self._joint)
            record = self._read_record()
            if record is not None:
                own["record"] = record
        # post-hooks are to see what is saved, so they run on the finished dict
        post_hooks, self._optimizer_state_dict_post_hooks = (
            self._optimizer_state_dict_post_hooks,
            OrderedDict(),
        )
        try:
            state_dict = super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = post_hooks
        checkpoint.complete(state_dict, self.param_groups, own)
        for hook in post_hooks.values():
            result = hook(self, state_dict)
            state_dict = state_dict if result is None else result
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
        state.update(checkpoint.apply_state(loaded, self.state, self._settings["kept"]))
        groups = loaded.groups if strict else self.param_groups
        self.__setstate__({"state": state, "param_groups": groups})
        counts.adopt(self.param_groups)
        # a scheduler's state loaded just before wins, once: the next file is another one
        counts.go_to(self.param_groups, loaded.k if counts.k_loaded is None else counts.k_loaded)
        counts.k_loaded = counts.own_loaded = None
        if loaded.skipped is not None:
            counts.place_skipped(loaded.skipped)
        if loaded.norms is not None:
            counts.place_norms(loaded.norms)
        if strict:
            counts.place_record(loaded.record, self._planner.layout(self.param_groups, self.state))

    def scope_state_dict(self, name: ScopeKey) -> dict[str, Any]:
        """What `state_dict` has of one scope alone, in copies; reads the counters from the device.

        It is free of the scope's name, so that it loads into another scope or another optimizer, and into a
        `torch.optim.AdamW` of that adapter alone.

        Args:
            name: what `scopes` calls it.

        Returns:
            `state` and `param_groups` in AdamW's form; under `"fusedlr"` schedules, peaks, limits, counts.

        Raises:
            ValueError: there is no such scope.
        """
        with self._lock:
            self._counts.adopt(self.param_groups)
            indices, groups = self._groups_of(name)
            counts = self._counts
            k, skipped = counts.read(self.param_groups), counts.read_skipped()
            norms = counts.read_norms()
            scope = self._planner.options(self.param_groups).scopes[self.scopes.index(name)]
            reached = [k[i] for i in indices], [skipped[i] for i in indices], [norms[i] for i in indices]
            return scope_state.saved(name, groups, self.state, *reached, scope)

    def load_scope_state_dict(self, name: ScopeKey, state_dict: dict[str, Any]) -> None:
        """Continue one scope from what `scope_state_dict` returned, of whichever scope and optimizer.

        All of it is restored: moments, counts of updates, schedule, peaks, step of the schedule, skips,
        limits, and the norms that a `ZClip` has seen. A file of `torch.optim.AdamW` restores what it has.
        Parameters that have names in both are matched by these. No other scope is touched; tensors are
        written over in place.

        Raises:
            ValueError: there is no such scope, or the file does not fit; says what. Nothing has been changed
                then.
        """
        with self._lock:
            self._counts.adopt(self.param_groups)
            indices, groups = self._groups_of(name)
            loaded = scope_state.read(name, groups, state_dict)
            scope_state.put(loaded, groups, self.state, self._settings["kept"])
            self._notes.changed = True
            skipped = loaded.skipped or [0] * len(groups)
            at = zip(indices, zip(loaded.k, skipped, strict=True), strict=True)
            self._counts.restart(self.param_groups, dict(at))
            if loaded.norms is not None:
                self._counts.place_norms(loaded.norms, indices)

    def reset_scope(self, name: ScopeKey, lr: float | None = None, schedule: Schedule | None = None) -> None:
        """Make one scope as new: moments, counts of updates, step of the schedule, skips, norms seen.

        In place: no address changes, no other scope is touched, captured CUDA graphs go on. Parameters stay
        as they are: give them their first values beside this.

        Args:
            name: what `scopes` calls it.
            lr: scales the peaks of its groups so that the first group's is this, >= 0; None leaves them.
            schedule: of all its groups, with absolute levels relative to the first group's peak; None leaves
                each its own.

        Raises:
            ValueError: there is no such scope, or an argument is out of range. Nothing has been changed then.
            TypeError: `schedule` is no `Schedule`.

        >>> import fusedlr
        >>> p = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = fusedlr.FusedAdamW([{"params": [p], "scope": "first"}], lr=0.5)
        >>> p.grad = torch.ones(3)
        >>> optimizer.step()
        >>> optimizer.reset_scope("first", lr=0.25)
        >>> optimizer.param_groups[0]["lr"], optimizer.state[p]["step"].item()
        (0.25, 0.0)
        """
        with self._lock:
            self._counts.adopt(self.param_groups)
            indices, groups = self._groups_of(name)
            peaks, schedule = scope_state.check_reset(groups, lr, schedule)
            scope_state.begin_anew(groups, peaks, schedule)
            scope_state.clear([p for group in groups for p in group["params"]], self.state)
            self._notes.changed = True
            self._counts.restart(self.param_groups, dict.fromkeys(indices, (0, 0)))

    def remove_scope(self, name: ScopeKey) -> None:
        """Take the groups of one scope out, with their state; the others go on.

        Raises:
            ValueError: there is no such scope.
        """
        with self._lock:
            self._counts.adopt(self.param_groups)
            indices, groups = self._groups_of(name)
            gone = [p for group in groups for p in group["params"]]
            rest = [i for i in range(len(self.param_groups)) if i not in indices]
            keys = scope_keys(self.param_groups, joint=self._joint)
            self.param_groups = [self.param_groups[i] for i in rest]
            for p in gone:
                self.state.pop(p, None)
            if isinstance(self.only, tuple):
                # an independent scope is called by the index of its group, which may be another one now
                left = [keys[i] for i in rest], scope_keys(self.param_groups, joint=self._joint)
                called = dict(zip(*left, strict=True))
                self._settings["only"] = tuple(called[key] for key in self.only if key in called)
            self._notes.changed = True
            self._counts.adopt(self.param_groups)
            # the same parameters may come back as another adapter
            self._counts.forget(gone)
            self._latest = Latest()

    def _groups_of(self, name: ScopeKey) -> tuple[list[int], list[ParamGroup]]:
        """The indices of a scope's groups, and these."""
        index_of_scope("name", name, self.scopes)
        keys = scope_keys(self.param_groups, joint=self._joint)
        indices = [i for i, key in enumerate(keys) if key == name]
        return indices, [self.param_groups[i] for i in indices]

    def __getstate__(self) -> dict[str, Any]:
        """State for pickle and deepcopy; reads the counters from the device."""
        # not while another thread makes a step
        with self._lock:
            self._counts.adopt(self.param_groups)
            return {
                **super().__getstate__(),
                # a process group is this process's own
                "_settings": {**self._settings, "process_group": None},
                "_own": [dict(group.own) for group in self.param_groups],
                "_k": self._counts.read(self.param_groups),
                "_skipped": self._counts.read_skipped(),
                "_norms": self._counts.read_norms(),
                "_record": self._read_record(),
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Adopt a state; called by pickle and, with groups and state alone, by loaders."""
        state = dict(state)
        k, skipped, own = state.pop("_k", None), state.pop("_skipped", None), state.pop("_own", None)
        norms, record = state.pop("_norms", None), state.pop("_record", None)
        super().__setstate__(state)
        self.__dict__.setdefault("_notes", Notes()).clear()
        if "_planner" in self.__dict__:
            # the plan belongs to the state that is being replaced
            self._planner.plan = None
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
            self._start(k, skipped, norms)
            self._counts.place_record(record, self._planner.layout(self.param_groups, self.state))

    @property
    def max_grad_norm(self) -> float | ZClip | None:
        """Norm that gradients are clipped to, or what finds it; may be changed while training."""
        return self._settings["max_grad_norm"]

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | ZClip | None) -> None:
        self._settings["max_grad_norm"] = checked_limit(value)
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
    def scopes(self) -> tuple[ScopeKey, ...]:
        """What the scopes are called, in the order in which metrics, norms and tensors have them.

        A scope's name; None for that of all groups without a name where these are joint, else the index of
        the group.
        """
        # of a plain dict in a group's place only the group knew its scope
        self._counts.adopt(self.param_groups)
        return scopes_of(self.param_groups, joint=self._joint)

    @property
    def only(self) -> Any:
        """The scopes that `step` and `zero_grad` take where they are told none, for wrappers that call them.

        None is all. See `step`.
        """
        return self._settings["only"]

    @only.setter
    def only(self, value: Any) -> None:
        if value is not None:
            chosen_scopes(value, self.scopes)
        if isinstance(value, str):
            value = (value,)
        self._settings["only"] = value if value is None or isinstance(value, Tensor) else tuple(value)

    @property
    def _joint(self) -> bool:
        return self._settings["groups"] == "joint"

    @property
    def backend(self) -> str:
        """Name of the backend that runs the step."""
        return choose_backend(self.param_groups, self._settings["backend"]).name

    def __repr__(self) -> str:
        """torch's listing of the groups, then what is fused, and the scopes and schedules that it lacks."""
        fused = {"backend": self.backend, "max_grad_norm": self.max_grad_norm, "nonfinite": self.nonfinite}
        line = ", ".join(f"{name}={value}" for name, value in {**fused, "groups": self.groups}.items())
        own = []
        for i, group in enumerate(self.param_groups):
            said = [f"scope {group['scope']!r}"] if "scope" in group else []
            if has_schedule(group):
                said.append(f"{group['schedule']!r} of peak {group['initial_lr']:g}")
            own += [f"group {i}: {', '.join(said)}"] if said else []
        return "\n".join([super().__repr__(), f"({line})", *own])
