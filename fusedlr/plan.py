"""From an optimizer's groups and state to the rows of one step: gathers and checks gradients, keeps counters.

Everything is checked before anything is allocated or changed. What is kept between steps is one float32
tensor of update counts per device, of which every `state[p]["step"]` is a view, and how tensors were packed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any, overload

import torch
from torch import Tensor

from fusedlr import compiled
from fusedlr.reference import MOMENTS, GroupStep, Row

State = dict[Tensor, dict[str, Any]]


class Pack:
    """The tensors of one step, and what a backend has made of them: valid until one is moved or replaced.

    Attributes:
        watch: the compiled check that all is still as it was; it also knows the gradients' addresses. None
            where that cannot be told, so that every step packs anew.
        kernel: for the backend to keep what it needs to run these tensors again.
    """

    def __init__(self, watch: Any = None) -> None:
        self.watch = watch
        self.kernel: Any = None


class Rows(Sequence[Row]):
    """The rows of a group, with the gradients of now; holds no tensor but the parameters."""

    def __init__(self, params: list[Tensor], state: State, amsgrad: bool, pack: Pack) -> None:
        self._params = params
        self._state = state
        self._amsgrad = amsgrad
        # weak: what a backend keeps in a pack may hold its rows
        self.pack = weakref.ref(pack)

    def __len__(self) -> int:
        return len(self._params)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._row(p) for p in self._params[index]]
        return self._row(self._params[index])

    def _row(self, p: Tensor) -> Row:
        entry = self._state[p]
        largest = entry["max_exp_avg_sq"] if self._amsgrad else None
        return Row(p, p.grad, entry["exp_avg"], entry["exp_avg_sq"], largest, entry["step"])  # type: ignore[arg-type]


def pack_of(groups: Sequence[GroupStep]) -> Pack:
    """The pack that these groups' rows are of, or an empty one for rows that come from elsewhere."""
    rows = groups[0].rows if groups else ()
    return (rows.pack() if isinstance(rows, Rows) else None) or Pack()


class Plan:
    """Packs the tensors of an optimizer. One plan lives as long as its optimizer's groups do."""

    def __init__(self, state_dtype: str | None) -> None:
        self._state_dtype = state_dtype
        # parameter -> its view into the counters of its device, and where that was made
        self._steps: dict[Tensor, Tensor] = {}
        self._places: dict[Tensor, int] = {}
        self._pack: Pack | None = None

    def still_holds(self, groups: list[dict[str, Any]], state: State) -> bool:
        """Whether the rows of the last `gather` are right for this step too; the gradients are then noted.

        Groups must have the options they had then. Follow it by `release`, whatever it says.
        """
        watch = self._pack.watch if self._pack is not None else None
        return watch is not None and watch.same(groups, state)

    def release(self) -> None:
        """Let go of the gradients."""
        if self._pack is not None and self._pack.watch is not None:
            self._pack.watch.release()

    def is_ready(self, groups: list[dict[str, Any]], state: State) -> bool:
        """Whether `gather` would make nothing new: every parameter has its state, and the state its place."""
        params = [(p, group["amsgrad"]) for group in groups for p in trainable([group])]
        return len(params) == len(self._steps) and all(
            self._has_place(p) and self._is_complete(p, state.get(p) or {}, amsgrad) for p, amsgrad in params
        )

    def _is_complete(self, p: Tensor, entry: dict[str, Any], amsgrad: bool) -> bool:
        moments = [entry.get(key) for key in _moments(amsgrad)]
        return entry.get("step") is self._steps[p] and all(
            isinstance(m, Tensor) and m.dtype == torch.promote_types(m.dtype, self.state_dtype(p))
            for m in moments
        )

    def forget(self) -> None:
        """Pack anew at the next step."""
        self._pack = None

    def gather(self, groups: list[dict[str, Any]], state: State, normed: list[bool]) -> list[Rows]:
        """For every group the rows of its trainable parameters that have a gradient.

        `normed` says of every group whether the norm of its gradients is needed. State of parameters that get
        their first gradient is made here; entries that were replaced from outside are adopted.

        Raises:
            RuntimeError: a gradient or state entry does not fit its parameter. Nothing has been changed then.
        """
        self._pack = None
        found = [[p for p in trainable([group]) if p.grad is not None] for group in groups]
        for i, (group, params) in enumerate(zip(groups, found, strict=True)):
            for p in params:
                reason = _misfit(p, p.grad, normed[i]) or _state_misfit(p, state.get(p))
                if reason:
                    raise RuntimeError(f"{parameter_name(group, i, p)}: {reason}")
        for group, params in zip(groups, found, strict=True):
            for p in params:
                self._ensure_state(p, state[p], group["amsgrad"])
        self._place_counters(groups, state, found)
        amsgrad = [bool(group["amsgrad"]) for group in groups]
        pack = self._pack = Pack(_watch(groups, state))
        return [Rows(params, state, flag, pack) for params, flag in zip(found, amsgrad, strict=True)]

    def state_dtype(self, p: Tensor) -> torch.dtype:
        """Dtype of the moments of `p`: fp32 for 16-bit parameters, unless they follow the parameter."""
        if self._state_dtype == "param" or p.dtype == torch.float64:
            return p.dtype
        return torch.float32

    def _ensure_state(self, p: Tensor, entry: dict[str, Any], amsgrad: bool) -> None:
        for key in _moments(amsgrad):
            # a model made fp64 after its first step has fp32 moments
            if key in entry and entry[key].dtype != torch.promote_types(
                entry[key].dtype, self.state_dtype(p)
            ):
                entry[key] = entry[key].to(self.state_dtype(p))
            if key not in entry:
                entry[key] = torch.zeros_like(
                    p, dtype=self.state_dtype(p), memory_format=torch.preserve_format
                )

    def _place_counters(self, groups: list[dict[str, Any]], state: State, found: list[list[Tensor]]) -> None:
        """Let every `state[p]["step"]` be a view into one tensor per device."""
        params = [p for some in found for p in some]
        moved = not all(map(self._has_place, params))
        # parameters that are gone must not be kept alive here
        if moved or len(self._steps) != sum(1 for _ in trainable(groups)):
            self._steps = _views(list(trainable(groups)))
            self._places = {p: view.data_ptr() for p, view in self._steps.items()}
            # every view is new now, also of parameters without a gradient in this step
            params = [p for p in self._steps if state.get(p)]
        for p in params:
            view, entry = self._steps[p], state[p]
            current = entry.get("step")
            if current is view:
                continue
            if current is None:
                view.zero_()
            else:
                _copy_step(view, current)
            entry["step"] = view

    def _has_place(self, p: Tensor) -> bool:
        """Whether the view of `p` is still the element of the counters that it was made as."""
        view = self._steps.get(p)
        if view is None or view.device != p.device:
            return False
        return view.data_ptr() == self._places[p] and view.dtype == torch.float32 and view.numel() == 1


def _moments(amsgrad: bool) -> tuple[str, ...]:
    return MOMENTS if amsgrad else MOMENTS[:2]


def _views(params: list[Tensor]) -> dict[Tensor, Tensor]:
    devices = {p.device for p in params}
    views: dict[Tensor, Tensor] = {}
    for device in devices:
        here = [p for p in params if p.device == device]
        counters = torch.zeros(len(here), dtype=torch.float32, device=device)
        views.update(zip(here, counters.unbind(), strict=True))
    return views


def _copy_step(view: Tensor, value: Any) -> None:
    if isinstance(value, Tensor):
        view.copy_(value.reshape(()))
    else:
        view.fill_(float(value))


def _watch(groups: list[dict[str, Any]], state: State) -> Any:
    """The compiled module's watch over these tensors, None where it cannot keep it."""
    if compiled.cpu is None:
        return None
    try:
        watch = compiled.cpu.Watch(groups, state)
    except (BufferError, RuntimeError, TypeError):
        # tensors without memory of their own, as of some subclasses
        return None
    # notes where the gradients are
    return watch if watch.same(groups, state) else None


def _misfit(p: Tensor, grad: Tensor | None, normed: bool) -> str | None:
    """Why this gradient cannot update this parameter, or be part of a norm if it is `normed`."""
    assert grad is not None
    # set by FSDP on what it shards: every rank would clip and skip by its own part
    if normed and getattr(p, "_fsdp_flattened", False):
        return (
            "a parameter sharded by FSDP has no gradient norm here: clip with FSDP's clip_grad_norm_, and "
            "pass max_grad_norm=None and nonfinite='propagate'"
        )
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
        # as FSDP and others leave what they have given back
        if type(x) in (Tensor, torch.nn.Parameter) and x.numel() and not x.data_ptr():
            return f"the memory of {what} has been freed"
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        return f"a parameter whose elements share memory, stride {p.stride()}, cannot be updated in place"
    return None


def _state_misfit(p: Tensor, entry: dict[str, Any] | None) -> str | None:
    """Why this state does not belong to this parameter."""
    if entry is not None and not isinstance(entry, dict):
        return f"its state is a {type(entry).__name__}, expected a dict"
    for key in MOMENTS:
        if not entry or key not in entry:
            continue
        value = entry[key]
        if not isinstance(value, Tensor):
            return f"its {key} is a {type(value).__name__}, expected a tensor"
        if value.shape != p.shape:
            return f"its {key} has shape {tuple(value.shape)} but the parameter has {tuple(p.shape)}"
        if value.device != p.device:
            return f"its {key} is on {value.device} but the parameter is on {p.device}"
    step = entry.get("step", 0) if entry else 0
    if isinstance(step, Tensor) and step.numel() != 1:
        return f"its step has shape {tuple(step.shape)}, expected one element"
    if not isinstance(step, (Tensor, Real)):
        return f"its step is {step!r}, expected a number"
    return None


def parameter_name(group: dict[str, Any], group_index: int, p: Tensor) -> str:
    """How an error calls a parameter: by its name if it has one, else by its place."""
    position = next(i for i, other in enumerate(group["params"]) if other is p)
    names = group.get("param_names")
    if names and position < len(names):
        return f"parameter {names[position]!r}"
    return f"parameter {position} of group {group_index}, shape {tuple(p.shape)}"


def trainable(groups: list[dict[str, Any]]) -> Iterator[Tensor]:
    """Every parameter that can get a gradient."""
    return (p for group in groups for p in group["params"] if p.requires_grad)
