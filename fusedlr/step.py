"""The plan of a step: checks parameters, gradients and state, makes what is missing, and asks a backend for a
stepper.

Everything is checked before anything is allocated or changed. A plan holds until its watch says that a
tensor, a group or the state is not what it was; then another plan takes its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fusedlr.backends import Backend, compiled
from fusedlr.backends.order import StepInputs
from fusedlr.columns import STATE
from fusedlr.counts import Counts, UpdateCounts
from fusedlr.groups import Options, parameter_name
from fusedlr.kept import MOMENTS, Kept, options_of_groups
from fusedlr.reference import Counters, Inputs, Row, Signals, Stepper, is_fake
from fusedlr.sharded import Layout, ReducingStepper
from fusedlr.tensors import SHARDED, gradient_misfit, state_misfit

State = dict[Tensor, dict[str, Any]]


class Watch(Inputs, Protocol):
    """The only judge of whether a plan still holds; it notes what is new in every step."""

    def unchanged(self, groups: list[dict[str, Any]], state: State) -> bool:
        """Whether all is as it was, but for values, given rates, and which gradients there are and where."""

    def remember_gradients(self) -> None:
        """Keep in mind which gradients these are, until `same_gradients` is asked."""

    def same_gradients(self) -> bool:
        """Whether the gradients are the remembered ones: same tensors, addresses and versions."""

    def release(self) -> None:
        """Let go of the tensors, which are kept alive from `unchanged` on."""


@dataclass(frozen=True)
class Plan:
    """All that was found for one set of tensors and groups."""

    groups: list[Any]  # kept, so that none of them can be mistaken for a later one
    chosen: list[tuple[Any, ...]]  # per group, the options that decide what is kept of its parameters
    counters: Counters
    rows: list[Row]
    watch: Watch
    stepper: Stepper
    layout: Layout | None  # of the processes that share the step; None where this one makes it alone

    def fits(self, groups: list[dict[str, Any]], counters: Counters) -> bool:
        """Whether the stepper can take other options of these groups: it has the addresses of state and
        counters.
        """
        return counters is self.counters and options_of_groups(groups) == self.chosen


class UncompiledWatch(StepInputs):
    """The watch where the compiled one is missing or cannot follow a tensor: every step is prepared anew."""

    def unchanged(self, groups: list[dict[str, Any]], state: State) -> bool:
        """Never, because this watch does not look."""
        return False

    def remember_gradients(self) -> None:
        """Nothing is remembered, because the next step has another watch."""

    def same_gradients(self) -> bool:
        """Never, because nothing is remembered."""
        return False

    def release(self) -> None:
        """Nothing is kept alive: the tensors belong to the rows."""


def prepare(
    groups: list[dict[str, Any]],
    state: State,
    options: Options,
    counts: Counts,
    updates: UpdateCounts,
    backend: Backend,
    kept: Kept,
    layout: Layout | None = None,
) -> Plan:
    """The plan of a step on these groups: a row for every parameter that has a gradient or has had one.

    State of parameters that get their first gradient is made here; entries that were replaced from outside
    are adopted.

    Raises:
        RuntimeError: a gradient or state entry does not fit its parameter. Nothing has been changed then.
    """
    found = allocate(groups, state, options, updates, kept)
    counts.place_on(device_of(groups, counts.counters.k.device), fp32=backend.single)
    columns = counts.record_of(candidates(groups, state))
    rows = []
    for i, (group, params) in enumerate(zip(groups, found, strict=True)):
        place = {id(p): j for j, p in enumerate(group["params"])}
        for p in params:
            counted, column = layout is None or layout.counts(p), columns.get(id(p), 0)
            rows.append(Row(i, p, state, kept.names(p, group), counted, place[id(p)], column))
    watch = _watch(groups, state, rows)
    stepper = backend.prepare(rows, counts.counters, watch)
    if layout is not None:
        stepper = ReducingStepper(stepper, layout, rows, counts.counters, watch)
    stepper.assign(options.groups, options.scopes)
    chosen = options_of_groups(groups)
    return Plan(list(groups), chosen, counts.counters, rows, watch, stepper, layout)


@torch.no_grad()
def measure(plan: Plan, options: Options, signals: Signals) -> None:
    """Write the sums of squares of all scopes, of those too whose steps need no norm; over all processes.

    Raises:
        RuntimeError: a parameter has no norm on this process alone.
    """
    # not through other options of the stepper: a captured graph would find other arguments than its own
    unnormed = {i for i, scope in enumerate(options.scopes) if not scope.normed}
    grads: dict[int, list[Tensor]] = {i: [] for i in unnormed}
    for row in plan.rows if unnormed else ():
        scope = options.groups[row.group].scope
        if scope not in unnormed or row.grad is None or not row.counted:
            continue
        if getattr(row.owner, "_fsdp_flattened", False):
            raise RuntimeError(f"{parameter_name(plan.groups[row.group], row.group, row.owner)}: {SHARDED}")
        grads[scope].append(row.grad)
    plan.stepper.norm(signals)
    xp = plan.counters.math
    factor = 1 if signals.grad_scale is None else 1 / xp.scalar(signals.grad_scale)
    for scope, own in grads.items():
        kinds = {(grad.device, grad.dtype == torch.float64) for grad in own}
        norms = [xp.scalar(0)]
        for device, double in kinds:
            alike = [x for x in own if (x.device, x.dtype == torch.float64) == (device, double)]
            dtype = torch.float64 if double else torch.float32
            each = torch.stack(torch._foreach_norm(alike, 2, dtype=dtype))
            norms.append(xp.scalar(torch.linalg.vector_norm(each.to(xp.dtype))))
        plan.counters.squares[scope] = (torch.stack(norms) * factor).square().sum()
    if plan.layout is not None:
        squares = plan.counters.squares[: len(options.scopes)]
        squares.copy_(plan.layout.add(squares.clone()))


@torch.no_grad()
def allocate(
    groups: list[dict[str, Any]],
    state: State,
    options: Options,
    updates: UpdateCounts,
    kept: Kept,
) -> list[list[Tensor]]:
    """Per group the parameters of a step, after everything is checked and their state is complete."""
    found = [_with_state(group, state) for group in groups]
    for i, (group, params) in enumerate(zip(groups, found, strict=True)):
        normed = options.scopes[options.groups[i].scope].normed
        for p in params:
            reason = gradient_misfit(p, normed) if p.grad is not None else None
            reason = reason or state_misfit(p, state.get(p))
            if reason:
                raise RuntimeError(f"{parameter_name(group, i, p)}: {reason}")
    for group, params in zip(groups, found, strict=True):
        for p in params:
            _complete(p, state[p], group, kept)
    updates.place(list(candidates(groups, state)), state)
    return found


def is_allocated(groups: list[dict[str, Any]], state: State, updates: UpdateCounts, kept: Kept) -> bool:
    """Whether `allocate` would make nothing new."""
    return updates.has_all(list(candidates(groups, state)), state) and all(
        _is_complete(p, state[p], group, kept) for group in groups for p in _with_state(group, state)
    )


def candidates(groups: list[dict[str, Any]], state: State) -> Iterator[Tensor]:
    """Every parameter that has state or may get some."""
    return (
        p
        for group in groups
        for p in group["params"]
        if p.requires_grad or p.grad is not None or state.get(p)
    )


def device_of(groups: list[dict[str, Any]], default: torch.device) -> torch.device:
    """The device of the first parameter that may be trained, or else `default`."""
    # a model on the meta device is filled in later
    return next((device for device in devices_of(groups) if device.type != "meta"), default)


def devices_of(groups: list[dict[str, Any]]) -> Iterable[torch.device]:
    """The devices of the parameters that may be trained, each once, in their order."""
    return dict.fromkeys(p.device for p in candidates(groups, {}))


def _with_state(group: dict[str, Any], state: State) -> list[Tensor]:
    """The parameters that have state after a step: a gradient or some state before it."""
    return [p for p in group["params"] if p.grad is not None or state.get(p)]


def _is_complete(p: Tensor, entry: dict[str, Any], group: dict[str, Any], kept: Kept) -> bool:
    return all(kept.fits(name, entry.get(name), p) for name in kept.names(p, group))


def _complete(p: Tensor, entry: dict[str, Any], group: dict[str, Any], kept: Kept) -> None:
    for name in kept.names(p, group):
        if name not in entry or not (name in MOMENTS or kept.fits(name, entry[name], p)):
            entry[name] = kept.new(name, p)
        # made under torch.inference_mode, and not to be written elsewhere
        elif entry[name].is_inference():
            wider = torch.promote_types(entry[name].dtype, kept.dtype(name, p))
            entry[name] = entry[name].to(wider, copy=True)
        # a model made fp64 after its first step has fp32 moments
        elif not kept.fits(name, entry[name], p):
            entry[name] = entry[name].to(kept.dtype(name, p))


def _watch(groups: list[dict[str, Any]], state: State, rows: list[Row]) -> Watch:
    # the compiled watch looks at addresses, of which torch says that fake tensors have none
    if compiled.host is not None and not any(is_fake(row.owner) for row in rows):
        try:
            params = [row.owner for row in rows]
            watch = compiled.host.Watch(groups, state, params, (*STATE, "step"))
            # notes gradients and rates
            if watch.unchanged(groups, state):
                return watch
        except (BufferError, RuntimeError, TypeError):
            # a tensor that torch does not describe, or a container of another kind
            pass
    return UncompiledWatch(rows, [group["lr"] for group in groups])
