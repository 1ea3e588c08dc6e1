"""The plan of a step: checks parameters, gradients and state, makes what is missing, and asks a backend for a
stepper.

Everything is checked before anything is allocated or changed. A plan holds until its watch says that a
tensor, a group or the state is not what it was; then another plan takes its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from fusedlr.backends import Backend, compiled
from fusedlr.backends.order import StepInputs
from fusedlr.columns import STATE
from fusedlr.counts import Counts, UpdateCounts
from fusedlr.groups import Notes, Options, has_schedule, parameter_name
from fusedlr.reference import Counters, Inputs, Row, Signals, Stepper, is_fake
from fusedlr.warn import warn

State = dict[Tensor, dict[str, Any]]
# what a moment may be put in as; whole numbers are turned into floating point
_MOMENTS = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)

_SHARDED = (
    "a parameter sharded by FSDP has no gradient norm here: clip with FSDP's clip_grad_norm_, and pass "
    "max_grad_norm=None and nonfinite='propagate'"
)


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

    groups: list[dict[str, Any]]  # kept, so that none of them can be mistaken for a later one
    names: list[tuple[str, ...]]  # per group, what the state of its parameters has
    counters: Counters
    rows: list[Row]
    watch: Watch
    stepper: Stepper

    def fits(self, groups: list[dict[str, Any]], counters: Counters) -> bool:
        """Whether the stepper can take other options of these groups: it has the addresses of state and
        counters.
        """
        return counters is self.counters and list(map(names_of_state, groups)) == self.names


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
    state_dtype: str | None,
) -> Plan:
    """The plan of a step on these groups: a row for every parameter that has a gradient or has had one.

    State of parameters that get their first gradient is made here; entries that were replaced from outside
    are adopted.

    Raises:
        RuntimeError: a gradient or state entry does not fit its parameter. Nothing has been changed then.
    """
    found = allocate(groups, state, options, updates, state_dtype)
    counts.place_on(device_of(groups, counts.counters.k.device), fp32=backend.single)
    rows = []
    for i, (group, params) in enumerate(zip(groups, found, strict=True)):
        rows += [Row(i, p, state, names_of_state(group)) for p in params]
    watch = _watch(groups, state, rows)
    stepper = backend.prepare(rows, counts.counters, watch)
    stepper.assign(options.groups, options.scopes)
    names = list(map(names_of_state, groups))
    return Plan(list(groups), names, counts.counters, rows, watch, stepper)


@torch.no_grad()
def measure(plan: Plan, options: Options, signals: Signals) -> None:
    """Write the sums of squares of all scopes, of those too whose steps need no norm.

    Raises:
        RuntimeError: a parameter has no norm on this process alone.
    """
    # not through other options of the stepper: a captured graph would find other arguments than its own
    unnormed = {i for i, scope in enumerate(options.scopes) if not scope.normed}
    grads: dict[int, list[Tensor]] = {i: [] for i in unnormed}
    for row in plan.rows if unnormed else ():
        scope = options.groups[row.group].scope
        if scope not in unnormed or row.param.grad is None:
            continue
        if getattr(row.param, "_fsdp_flattened", False):
            raise RuntimeError(f"{parameter_name(plan.groups[row.group], row.group, row.param)}: {_SHARDED}")
        grads[scope].append(row.param.grad)
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


@torch.no_grad()
def allocate(
    groups: list[dict[str, Any]],
    state: State,
    options: Options,
    updates: UpdateCounts,
    state_dtype: str | None,
) -> list[list[Tensor]]:
    """Per group the parameters of a step, after everything is checked and their state is complete."""
    found = [[p for p in group["params"] if p.grad is not None or state.get(p)] for group in groups]
    for i, (group, params) in enumerate(zip(groups, found, strict=True)):
        normed = options.scopes[options.groups[i].scope].normed
        for p in params:
            reason = _gradient_misfit(p, normed) if p.grad is not None else None
            reason = reason or state_misfit(p, state.get(p))
            if reason:
                raise RuntimeError(f"{parameter_name(group, i, p)}: {reason}")
    for group, params in zip(groups, found, strict=True):
        for p in params:
            _complete(p, state[p], group, dtype_of_state(p, state_dtype))
    updates.place(list(candidates(groups, state)), state)
    return found


def is_allocated(
    groups: list[dict[str, Any]], state: State, updates: UpdateCounts, state_dtype: str | None
) -> bool:
    """Whether `allocate` would make nothing new."""
    return updates.has_all(list(candidates(groups, state)), state) and all(
        _is_complete(state[p], group, dtype_of_state(p, state_dtype))
        for group in groups
        for p in candidates([group], state)
    )


def only_allocates(groups: list[dict[str, Any]], state: State, notes: Notes) -> bool:
    """Whether this is the step at lr 0 that checkpoint tools make to have the state allocated.

    They assign that rate, which a warm-up from 0 shows already, and nothing else, and their gradients are
    zero. These are looked at, which waits for a GPU, only if all the rest is so.
    """
    assigned = notes.lr_assigned if notes.others_assigned else notes.lr_assigned | notes.lr_written_back
    assigned_0 = len(groups) > 0 and all(
        id(group) in assigned
        and has_schedule(group)
        and not isinstance(group["lr"], Tensor)
        and group["lr"] == 0
        for group in groups
    )
    return (
        assigned_0
        and not state
        and not any(
            p.grad is not None and (p.grad.layout != torch.strided or bool(p.grad.any()))
            for group in groups
            for p in group["params"]
        )
    )


def check_capture(groups: list[dict[str, Any]]) -> None:
    """Every trainable parameter has a gradient that a captured step can read, else RuntimeError."""
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
        stepped = {id(row.param) for row in before.rows if before.groups[row.group] is group}
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


def dtype_of_state(p: Tensor, state_dtype: str | None) -> torch.dtype:
    """Dtype of the moments of `p`: fp32 for 16-bit parameters, unless they follow the parameter."""
    return p.dtype if state_dtype == "param" or p.dtype == torch.float64 else torch.float32


def names_of_state(group: dict[str, Any]) -> tuple[str, ...]:
    """The tensors that the state of this group's parameters has beside `step`."""
    return tuple(name for name, option in STATE.items() if option is None or group[option])


def _is_complete(entry: dict[str, Any], group: dict[str, Any], dtype: torch.dtype) -> bool:
    kept = [entry.get(name) for name in names_of_state(group)]
    return all(isinstance(x, Tensor) and x.dtype == torch.promote_types(x.dtype, dtype) for x in kept)


def _complete(p: Tensor, entry: dict[str, Any], group: dict[str, Any], dtype: torch.dtype) -> None:
    for name in names_of_state(group):
        if name not in entry:
            entry[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        # made under torch.inference_mode, and not to be written elsewhere
        elif entry[name].is_inference():
            entry[name] = entry[name].to(torch.promote_types(entry[name].dtype, dtype), copy=True)
        # a model made fp64 after its first step has fp32 moments
        elif entry[name].dtype != torch.promote_types(entry[name].dtype, dtype):
            entry[name] = entry[name].to(dtype)


def _watch(groups: list[dict[str, Any]], state: State, rows: list[Row]) -> Watch:
    # the compiled watch looks at addresses
    if compiled.host is not None and not any(is_fake(row.param) for row in rows):
        try:
            params = [row.param for row in rows]
            watch = compiled.host.Watch(groups, state, params, (*STATE, "step"))
            # notes gradients and rates
            if watch.unchanged(groups, state):
                return watch
        except (BufferError, RuntimeError, TypeError):
            # a tensor without memory of its own, as of some subclasses
            pass
    return UncompiledWatch(rows, [group["lr"] for group in groups])


def _gradient_misfit(p: Tensor, normed: bool) -> str | None:
    """Why the gradient of `p` cannot update it, or be part of a norm if it is `normed`."""
    grad = p.grad
    assert grad is not None
    # set by FSDP on what it shards: every rank would clip and skip by its own part
    if normed and getattr(p, "_fsdp_flattened", False):
        return _SHARDED
    for x, what in ((p, "a parameter"), (grad, "a gradient")):
        if type(x).__name__ == "DTensor":
            return f"{what} that is a DTensor is not supported: no norm over shards is defined here"
        if x.is_complex():
            return f"{what} that is complex is not supported"
    if grad.layout != torch.strided:
        return f"a gradient of layout {grad.layout} is not supported: gradients must be dense"
    if grad.dtype != p.dtype:
        return f"its gradient is {grad.dtype} but the parameter is {p.dtype}"
    if grad.device != p.device:
        return f"its gradient is on {grad.device} but the parameter is on {p.device}"
    if grad.shape != p.shape:
        return f"its gradient has shape {tuple(grad.shape)} but the parameter has {tuple(p.shape)}"
    if not p.is_floating_point():
        return f"a parameter of dtype {p.dtype} cannot be optimized"
    if p.device.type == "meta":
        return "a parameter on the meta device has no numbers to update"
    for x, what in ((p, "the parameter"), (grad, "its gradient")):
        # FSDP leaves parameters whose storage has been freed
        if _is_freed(x):
            return f"the memory of {what} has been freed"
    if _share_memory(p):
        return f"a parameter whose elements share memory, stride {p.stride()}, cannot be updated in place"
    return None


def _share_memory(x: Tensor) -> bool:
    """Whether elements of a tensor lie in one place, so that it cannot be updated."""
    return any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))


def _is_freed(x: Tensor) -> bool:
    return bool(type(x) in (Tensor, torch.nn.Parameter) and x.numel() and not x.data_ptr())


def state_misfit(p: Tensor, entry: dict[str, Any] | None) -> str | None:
    """Why this state does not belong to this parameter."""
    if entry is not None and not isinstance(entry, dict):
        return f"its state is a {type(entry).__name__}, expected a dict"
    for key in STATE:
        if not entry or key not in entry:
            continue
        value = entry[key]
        if not isinstance(value, Tensor):
            return f"its {key} is a {type(value).__name__}, expected a tensor"
        if value.shape != p.shape:
            return f"its {key} has shape {tuple(value.shape)} but the parameter has {tuple(p.shape)}"
        if value.device != p.device:
            return f"its {key} is on {value.device} but the parameter is on {p.device}"
        if value.layout != torch.strided:
            return f"its {key} is of layout {value.layout}, expected a dense tensor"
        if value.dtype not in _MOMENTS:
            return f"its {key} is {value.dtype}, expected a floating point number of 16 bits or more"
        if _share_memory(value):
            return f"its {key} has elements that share memory, stride {value.stride()}"
        if _is_freed(value):
            return f"the memory of its {key} has been freed"
    step = entry.get("step", 0) if entry else 0
    if isinstance(step, Tensor) and step.numel() != 1:
        return f"its step has shape {tuple(step.shape)}, expected one element"
    if not isinstance(step, (Tensor, Real)):
        return f"its step is {step!r}, expected a number"
    return None
