"""Which plan the next step has: the one at hand while it holds, or another; and what a step made of it tells.

`FusedAdamW` has one planner. Its plan is replaced when the watch says that tensors have changed; when a
group notes a change of options, the plan's stepper takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedlr import backends
from fusedlr.counts import Counts, UpdateCounts
from fusedlr.groups import Notes, Options, has_schedule, warn_assigned
from fusedlr.reference import Made, Signals, active_scopes, capturing, is_fake, local
from fusedlr.sharded import Layout, tell_failure
from fusedlr.step import (
    Plan,
    State,
    allocate,
    candidates,
    device_of,
    devices_of,
    is_allocated,
    measure,
    prepare,
)
from fusedlr.warn import warn

NO_SIGNALS = Signals()
_ALLOCATE_BEFORE_CAPTURE = (
    "make one step outside the CUDA graph before capturing it: the state is allocated there"
)
_NO_NORM_IN_CAPTURE = (
    "grad_norm() cannot be captured in a CUDA graph: a captured step computes the norm, which metrics() has"
)


class Planner:
    """Makes the plan of an optimizer's steps and keeps it while it holds.

    Attributes:
        plan: that of the last step; None where the next step makes one.
    """

    def __init__(self, settings: dict[str, Any], notes: Notes, counts: Counts) -> None:
        self._settings, self._notes, self._counts = settings, notes, counts
        self.plan: Plan | None = None
        # what the plan's stepper was given last
        self._options = Options([], [], [], kept=True)
        # whose gradients `grad_norm` has just measured
        self._measured: Plan | None = None
        self._updates = UpdateCounts()
        self._warned: set[str] = set()

    def plan_for(
        self,
        groups: list[Any],
        state: State,
        signals: Signals = NO_SIGNALS,
        *,
        may_only_allocate: bool = True,
    ) -> Plan | None:
        """The plan of a step on these groups, with the options that they have now.

        None if the step was only to allocate the state, which has been done then.

        Raises:
            RuntimeError: a gradient or state entry cannot be used. Nothing has been changed then.
        """
        plan = self.plan
        if plan is not None and not plan.watch.unchanged(groups, state):
            plan = None
        if plan is not None and not self._notes.changed:
            return plan
        self._counts.adopt(groups)
        if plan is None or not plan.fits(groups, self._counts.counters):
            return self._prepared(groups, state, signals, may_only_allocate=may_only_allocate)
        before, self._options = self._options, self._new_options(groups)
        if [step.scope for step in before.groups] != [step.scope for step in self._options.groups]:
            # the norms are those of other scopes
            self._measured = None
        plan.stepper.assign(self._options.groups, self._options.scopes)
        return plan

    def follow(self, groups: list[Any]) -> None:
        """Let the plan's stepper take changed options now: captured launches need no step to see them."""
        plan = self.plan
        if plan is None or not plan.fits(groups, self._counts.counters):
            return
        options = self.options(groups)
        # an lr that was assigned holds for the next step alone, which takes the options itself
        if not options.overruled:
            plan.stepper.assign(options.groups, options.scopes)

    def _prepared(
        self, groups: list[Any], state: State, signals: Signals, *, may_only_allocate: bool
    ) -> Plan | None:
        """Check everything and make the plan; None if the step was only to allocate the state."""
        before, self.plan = self.plan, None
        if before is not None:
            self._warn_once("parts", warn_parts, before, groups)
        backend = choose_backend(groups, self._settings["backend"])
        if backend.name == "reference" and backends.requested(self._settings["backend"])[0] == "auto":
            self._warn_once("fallback", backends.warn_fallback, devices_of(groups))
        # what is not a number raises here, before any group has been updated
        options, kept = self._new_options(groups), self._settings["kept"]
        self._warn_once("gradients", warn_without_gradients, groups)
        layout = self.layout(groups, state)
        if may_only_allocate and only_allocates(groups, state, self._notes, layout):
            allocate(groups, state, options, self._updates, kept)
            self._notes.clear()
            return None
        if self.is_capturing() and not is_allocated(groups, state, self._updates, kept):
            # tensors allocated while a CUDA graph is captured have no values until it is replayed
            raise RuntimeError(_ALLOCATE_BEFORE_CAPTURE)
        given = self._counts, self._updates, backend, kept, layout
        try:
            self.plan = prepare(groups, state, options, *given)
        except Exception:
            if layout is not None:
                squares = self._counts.counters.squares
                tell_failure(layout, options.scopes, signals, squares, norm_alone=not may_only_allocate)
            raise
        self._options = options
        return self.plan

    def layout(self, groups: list[Any], state: State) -> Layout | None:
        """Over which processes the tensors of these groups are spread; None where they are all here."""
        return Layout.of(candidates(groups, state), self._settings["process_group"])

    def options(self, groups: list[Any]) -> Options:
        """The options of these groups as they stand now."""
        settings = self._settings
        return Options.of(
            groups,
            self._notes,
            joint=settings["groups"] == "joint",
            max_grad_norm=settings["max_grad_norm"],
            nonfinite=settings["nonfinite"],
        )

    def _new_options(self, groups: list[Any]) -> Options:
        options = self.options(groups)
        # taken anew for the next step, if a schedule then takes over again or a value may change in place
        self._notes.changed = bool(options.overruled) or not options.kept
        return options

    def _warn_once(self, about: str, warning: Any, *given: Any) -> None:
        """Call a function that warns until it has; False says that it had no reason to."""
        if about not in self._warned and warning(*given) is not False:
            self._warned.add(about)

    def is_capturing(self) -> bool:
        """Whether the step becomes part of a CUDA graph."""
        k = self._counts.counters.k
        # a tensor takes 0.3 us to tell its device, and 0.03 to tell whether that is a GPU
        return k.is_cuda and capturing(k.device)

    def measure(self, groups: list[Any], state: State, scale: Tensor | float | None) -> Tensor:
        """Per scope the norm of the gradients, divided by `scale`; the next step may take it over."""
        if self.is_capturing():
            raise RuntimeError(_NO_NORM_IN_CAPTURE)
        try:
            plan = self.plan_for(groups, state, may_only_allocate=False)
            assert plan is not None
            measure(plan, self._options, Signals(scale))
            plan.watch.remember_gradients()
        finally:
            self.release()
        # processes would have to agree that none of their gradients has changed
        alone = plan.layout is None
        self._measured = plan if alone and scale is None and self._settings["amp_scaling"] else None
        return self._counts.counters.squares[: len(self._options.scopes)].sqrt()

    def is_measured(self, plan: Plan, signals: Signals) -> bool:
        """Whether the norm of the step under way has been computed already; asked once per step.

        Raises:
            RuntimeError: the step is being captured and a gradient is missing.
        """
        measured, self._measured = self._measured, None
        if self.is_capturing():
            may = zip(plan.groups, self._options.groups, strict=True)
            check_capture([group for group, step in may if signals.allow(step.scope)])
            # every replay has gradients of its own
            return False
        return (
            measured is plan
            and signals.grad_scale is None
            and signals.found_inf is None
            and plan.watch.same_gradients()
        )

    def release(self) -> None:
        """Let go of the gradients, which the watch has kept alive during a step."""
        if self.plan is not None:
            self.plan.watch.release()

    def made(self, plan: Plan, made: Made | None, signals: Signals) -> None:
        """Show the rate just used in `group["lr"]` and count the step on the host.

        Groups that were not to make the step show what they showed. What was assigned to one waits for the
        step that its scope makes.
        """
        counts, options, groups = self._counts, self._options, plan.groups
        rates = None if made is None else made.lr
        # None, without a look at every group, where all may make the step
        allowed = signals.allowed_groups(options.groups)
        used: Sequence[bool] | None = allowed
        # another process may have the gradients that this one lacks
        if options.overruled and plan.layout is None and not all(scope.always for scope in options.scopes):
            active = active_scopes(plan.rows, options.groups, options.scopes, signals)
            used = [active[step.scope] for step in options.groups]
        for i, step in enumerate(options.groups):
            if step.schedule is not None and (allowed is None or allowed[i]):
                groups[i].show(rates[i] if rates else step.schedule.lr_at(counts.k[i], step.peak))
        for i in options.overruled:
            if used is None or used[i]:
                groups[i].shown_lr = None
                self._warn_once("assigned", warn_assigned, i, groups[i], counts.k[i])
        if used is None:
            self._notes.clear()
        else:
            self._notes.clear(kept={id(g) for g, one in zip(groups, used, strict=True) if not one})
        counts.made(made, () if made is not None else plan.stepper.active(), allowed)


def choose_backend(groups: list[dict[str, Any]], name: str) -> backends.Backend:
    """The backend that runs steps on these groups, under the name that the optimizer was given."""
    if any(is_fake(p) for group in groups for p in group["params"]):
        # kernels need addresses
        return backends.BACKENDS["reference"]
    return backends.choose(name, devices_of(groups))


def only_allocates(
    groups: list[dict[str, Any]], state: State, notes: Notes, layout: Layout | None = None
) -> bool:
    """Whether this is the step at lr 0 that checkpoint tools make to have the state allocated.

    They assign that rate, which a warm-up from 0 shows already, and nothing else, and their gradients are
    zero, on every process. These are looked at, which waits for a GPU, only if all the rest is so.
    """
    assigned = notes.lr_assigned if notes.others_assigned else notes.lr_assigned | notes.lr_written_back
    assigned_0 = len(groups) > 0 and all(
        id(group) in assigned
        and has_schedule(group)
        and not isinstance(group["lr"], Tensor)
        and group["lr"] == 0
        for group in groups
    )
    if not assigned_0 or state:
        return False
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    # what cannot be looked at so is refused later
    some = any(x.layout != torch.strided or bool(local(x).any()) for x in grads)
    return not (some if layout is None else layout.any(some, device_of(groups, torch.device("cpu"))))


def check_capture(groups: list[dict[str, Any]]) -> None:
    """Every trainable parameter of these groups has a gradient that a captured step can read, else
    RuntimeError.
    """
    missing = sum(p.requires_grad and p.grad is None for group in groups for p in group["params"])
    if missing:
        raise RuntimeError(
            f"{missing} parameters have no gradient while a CUDA graph is being captured: a replay would "
            "never update them. Call zero_grad(set_to_none=False) before the capture"
        )


def warn_parts(before: Plan, groups: list[dict[str, Any]]) -> bool:
    """Warn if a group with a schedule holds none of the parameters that it had in the last step; whether it
    did.

    Wrappers that make one step per part of a group (DeepSpeed's ZeRO stage 3) move its schedule on at each.
    """
    for i, group in enumerate(groups):
        stepped = {id(row.owner) for row in before.rows if before.groups[row.group] is group}
        if has_schedule(group) and stepped and stepped.isdisjoint(map(id, group["params"])):
            warn(
                f"group {i} holds none of the parameters that it had in the last step, and its schedule "
                "counts every step: a wrapper that makes several steps per update (DeepSpeed's ZeRO stage 3 "
                "does) runs through it too fast. Pass schedule=None and let the wrapper's scheduler drive it"
            )
            return True
    return False


def warn_without_gradients(groups: list[dict[str, Any]]) -> bool:
    """Warn if a step is to update nothing because no parameter has a gradient; whether it did."""
    params = [p for group in groups for p in group["params"]]
    if not params or any(p.grad is not None for p in params):
        return False
    if any(p.requires_grad for p in params):
        why = "call backward() first, and build the optimizer from the parameters that the loss depends on"
    else:
        why = "none of them requires one, so the model's trainable parameters are not in this optimizer"
    warn(f"this step updates nothing, as no parameter of the optimizer has a gradient: {why}")
    return True
