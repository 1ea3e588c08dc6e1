"""The step on a GPU but for its kernels: fills the tables of fusedlr/tables.py for them.

`step_`, with a way to launch kernels, has the signature and the meaning of `reference.step_`. What kernels
cannot read in place runs through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import chain
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fusedlr import reference
from fusedlr.order import copy_back, has_memory, in_order
from fusedlr.plan import pack_of
from fusedlr.reference import Counters, GroupStep, Row, Signals, TensorMath
from fusedlr.staging import Table, capturing
from fusedlr.tables import GROUP_INTS, PHASE_INTS, TENSORS, Layout, pack_groups

# dtype of a parameter and its gradient, and of its moments
Kind = tuple[torch.dtype, torch.dtype]
_KINDS = {
    (p, moments) for p in (torch.float32, torch.bfloat16, torch.float16) for moments in {torch.float32, p}
}

# a launch that only counts is of this kind
_EMPTY = torch.float32, torch.float32


def why_not(devices: Iterable[torch.device], of: Callable[[torch.device], str | None]) -> str | None:
    """Why a backend cannot update tensors on these devices, or None; `of` tells for a single one."""
    devices = set(devices)
    if len(devices) > 1:
        return "it does not run on several devices at once"
    return next(filter(None, map(of, devices)), None)


class Launch(NamedTuple):
    """What the launches of a step are given: tables and scalars on the device, and counts."""

    tensors: Tensor  # int64 (count, len(TENSORS))
    chunks: Tensor  # int32 (programs, len(CHUNKS))
    ints: Tensor  # int64: (groups, len(GROUP_INTS)), (phases, len(PHASE_INTS))
    floats: Tensor  # fp32: (groups, len(GROUP_FLOATS)), (phases, len(PHASE_FLOATS)), tables
    gradients: Any  # as `Launcher._place_gradients` returned them
    counts: Tensor  # see reference.Counters
    used: Tensor
    norms: Tensor  # fp32: (groups,), then a partial sum per chunk
    tickets: Tensor  # int32 (2,)
    grad_scale: Tensor  # fp32 (1,)
    found_inf: Tensor  # fp32 (1,)
    alive: Tensor  # int32 (1,): see `Generation`
    now: int
    layout: Layout
    groups: int
    phases: int
    rows: int
    normed: bool
    with_amsgrad: set[Kind]


class Launcher:
    """What is kept of one optimizer from step to step; subclasses launch kernels."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tensors, self._grads = Table(device, torch.int64), Table(device, torch.int64)
        self._chunks = Table(device, torch.int32)
        self._ints, self._floats = Table(device, torch.int64), Table(device, torch.float32)
        self._tickets = torch.zeros(2, dtype=torch.int32, device=device)
        self._one = torch.ones(1, dtype=torch.float32, device=device)
        self._zero = torch.zeros(1, dtype=torch.float32, device=device)
        # captured launches do nothing once this is not what it was for them
        self._generation = Generation(device)
        self._norms = self._rates = torch.empty(0)
        self._key: Any = None
        self._rows: list[int] = []
        self._layout = Layout([], [], [], 0)
        # arguments of captured launches, and rows of their tables
        self._captured: list[Any] = []
        self._captured_rows: set[tuple[int, ...]] = set()
        self._captured_frame: Any = None
        self._packed_from: tuple[Any, ...] = ()
        self._packed: tuple[list[int], list[float], int] = [], [], 0
        self._with_amsgrad: set[Kind] = set()

    def arrange(self, rows: Sequence[Row], kinds: Sequence[Kind], counts: Sequence[int], joint: bool) -> None:
        """Lay out a step on these rows, in order; the next `counts[i]` of them are group i's."""
        sizes = [row.param.numel() for row in rows]
        amsgrad = [row.max_exp_avg_sq is not None for row in rows]
        key = sizes, list(kinds), list(counts), amsgrad, joint
        if key != self._key:
            self._layout = Layout.of(sizes, kinds, counts, joint, _EMPTY)
            self._with_amsgrad = {kind for kind, top in zip(kinds, amsgrad, strict=True) if top}
            length = len(counts) + self._layout.programs
            self._norms = torch.empty(length, dtype=torch.float32, device=self.device)
            self._key = key
        group_of = [i for i, count in enumerate(counts) for _ in range(count)]
        of = [_tensors(row, size, group) for row, size, group in zip(rows, sizes, group_of, strict=True)]
        if self._captured_rows and not self._captured_rows.issuperset(of):
            self.outdate()
        self._rows = list(chain.from_iterable(of))

    def step(
        self,
        groups: Sequence[GroupStep],
        gradients: Any,
        counters: Counters,
        signals: Signals,
        *,
        joint: bool,
    ) -> None:
        """Launch a step on the rows last arranged.

        `gradients`: their addresses, or a watch that has noted them.
        """
        counters.use_fp32()
        if self._rates.numel() != len(groups):
            self._rates = torch.zeros(len(groups), dtype=torch.float32, device=self.device)
        ints, floats, phases = self._hyperparameters(groups, joint)
        normed = any(group.max_grad_norm is not None or group.skip_nonfinite for group in groups)
        # captured launches share these two tables, new values included, while they are laid out alike
        frame = normed, phases, len(floats), self._layout.slots
        if self._captured_frame not in (None, frame):
            self.outdate()
        scale, inf = signals.grad_scale, signals.found_inf
        launch = Launch(
            tensors=self._tensors.put(self._rows, pinned_to_graph=True),
            chunks=self._chunks.put(self._layout.chunks, pinned_to_graph=True),
            ints=self._ints.put(ints),
            floats=self._floats.put(floats),
            gradients=self._place_gradients(gradients),
            counts=counters.counts,
            used=counters.used,
            norms=self._norms,
            tickets=self._tickets,
            grad_scale=self._one if scale is None else self._fp32(scale),
            found_inf=self._zero if inf is None else self._flag(inf),
            alive=self._generation.tensor,
            now=self._generation.number,
            layout=self._layout,
            groups=len(groups),
            phases=phases,
            rows=len(self._rows) // len(TENSORS),
            normed=normed,
            with_amsgrad=self._with_amsgrad,
        )
        if capturing(self.device):
            # a replay reads them long after the next step has got others
            self._captured.append((launch, self._rates, [group.lr for group in groups]))
            self._captured_frame = frame
            width = len(TENSORS)
            self._captured_rows.update(zip(*(self._rows[i::width] for i in range(width)), strict=True))
        self._queue(self._launch, launch)

    def _queue(self, launch: Callable[..., None], *arguments: Any) -> None:
        """Launch on the tensors' device; what had begun is forgotten if that fails."""
        try:
            with self._guard():
                launch(*arguments)
        except BaseException:
            # some launches took tickets, and the last one of them will not come
            with suppress(RuntimeError):
                # which fails too if the device is lost
                self._tickets.zero_()
            raise

    def _place_gradients(self, gradients: Any) -> Any:
        """Where the kernels find the gradients' addresses: in a table."""
        addresses = gradients if isinstance(gradients, list) else gradients.gradients
        return self._grads.put(addresses, pinned_to_graph=True)

    def _launch(self, launch: Launch) -> None:
        """Queue the kernels of a step."""
        raise NotImplementedError

    def outdate(self) -> None:
        """Let the launches captured so far do nothing when they are replayed."""
        if capturing(self.device):
            # the device would hear of it in a replay only
            raise RuntimeError(
                "tensors have changed since the last step outside the CUDA graph: make one before capturing"
            )
        self._generation.advance()
        self._captured_rows.clear()
        self._captured_frame = None

    def _hyperparameters(
        self, groups: Sequence[GroupStep], joint: bool
    ) -> tuple[list[int], list[float], int]:
        """What `pack_groups` makes of the groups, and the number of phases; packed when a group is new."""
        addresses = [self._rate(group) for group in groups]
        before = self._packed_from
        same = len(before) == len(groups) + 3 and all(map(is_, before, (*groups, self._layout)))
        if not same or before[-2:] != (addresses, joint):
            ints, floats = pack_groups(groups, self._layout, addresses, joint)
            phases = (len(ints) - len(groups) * len(GROUP_INTS)) // len(PHASE_INTS)
            self._packed_from = *groups, self._layout, addresses, joint
            self._packed = ints, floats, phases
        return self._packed

    def _guard(self) -> AbstractContextManager[Any]:
        """Make the tensors' device the current one, which kernels are launched on."""
        if self.device.type == "cpu":
            return nullcontext()
        module = getattr(torch, self.device.type)
        return nullcontext() if self.device.index == module.current_device() else module.device(self.device)

    def _rate(self, group: GroupStep) -> int:
        """The address of a rate that is a tensor, as fp32 on the device, else 0."""
        if not isinstance(group.lr, Tensor):
            return 0
        if group.lr.device == self.device and group.lr.dtype == torch.float32:
            return group.lr.data_ptr()
        kept = self._rates[group.index]
        kept.copy_(group.lr.detach().reshape(()), non_blocking=True)
        return kept.data_ptr()

    def _fp32(self, x: Tensor | float) -> Tensor:
        """A number or a tensor of one element as fp32 on the device."""
        if isinstance(x, Tensor):
            return reference.move(x.detach().reshape(1), self.device, torch.float32)
        return torch.full((1,), float(x), dtype=torch.float32, device=self.device)

    def _flag(self, x: Tensor | float) -> Tensor:
        """A number as fp32 that is 0 where it is 0 and nowhere else."""
        # an integer or a tiny fp64 number could round to 0
        exact = isinstance(x, Tensor) and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return self._fp32(x if exact else x != 0)


def _tensors(row: Row, size: int, group: int) -> tuple[int, ...]:
    """A row of the table of tensors: see `tables.TENSORS`."""
    top = 0 if row.max_exp_avg_sq is None else row.max_exp_avg_sq.data_ptr()
    moments = row.exp_avg.data_ptr(), row.exp_avg_sq.data_ptr()
    return row.param.data_ptr(), *moments, top, row.step.data_ptr(), size, group


class Generation:
    """Counts how often tensors of captured steps have been moved or replaced, here and on the device.

    A launch is given the count and where it is kept. One that was captured in a CUDA graph finds, when it is
    replayed, that the count has moved on: it changes nothing but a counter of such launches.
    """

    def __init__(self, device: torch.device) -> None:
        self.number = 0
        self.tensor = torch.zeros(1, dtype=torch.int32, device=device)

    def advance(self) -> None:
        """Make every launch captured so far stale."""
        self.number += 1
        self.tensor.fill_(self.number)


# belongs to an optimizer for as long as its counters do
_launchers: WeakKeyDictionary[TensorMath, list[Launcher]] = WeakKeyDictionary()


def _launcher(make: type[Launcher], math: TensorMath, device: torch.device) -> Launcher:
    """The optimizer's launcher of this kind."""
    kept = _launchers.setdefault(math, [])
    if kept and (type(kept[-1]) is not make or kept[-1].device != device):
        # other launches captured so far may not fit what this one makes of the tensors
        kept[-1].outdate()
    for i, launcher in enumerate(kept):
        if type(launcher) is make and launcher.device == device:
            kept.append(kept.pop(i))
            return launcher
    # the others stay: graphs that were captured with them read their tables
    kept.append(make(device))
    return kept[-1]


@torch.no_grad()
def step_(
    make: type[Launcher], groups: Sequence[GroupStep], counters: Counters, signals: Signals, *, joint: bool
) -> None:
    """Make one optimizer step, in place, by a launcher of this kind: see `reference.step_`."""
    pack = pack_of(groups)
    if isinstance(pack.kernel, make):
        pack.watch.increment_versions()
        pack.kernel.step(groups, pack.watch, counters, signals, joint=joint)
        return
    rows = list(chain.from_iterable(group.rows for group in groups))
    ordered = list(map(in_order, rows))
    device = counters.counts.device
    kinds = [_kind(row, device) for row in ordered]
    if None in kinds:
        reference.step_(groups, counters, signals, joint=joint)
        return
    launcher = _launcher(make, counters.math, device)
    launcher.arrange(ordered, [kind for kind in kinds if kind], [len(group.rows) for group in groups], joint)
    # autograd must know, so that a backward through values from before the step raises
    torch.autograd.graph.increment_version(chain.from_iterable(row.written() for row in rows))
    gradients = [row.grad.data_ptr() for row in ordered]
    launcher.step(groups, gradients, counters, signals, joint=joint)
    if all(map(is_, rows, ordered)):
        pack.kernel = launcher if pack.watch is not None else None
    else:
        copy_back(rows, ordered)


def _kind(row: Row, device: torch.device) -> Kind | None:
    """The bucket of a tensor, or None if there is no kernel for it or it is elsewhere."""
    kind = row.param.dtype, row.exp_avg.dtype
    moments = {x.dtype for x in (row.exp_avg, row.exp_avg_sq, row.max_exp_avg_sq) if x is not None}
    fits = (
        kind in _KINDS
        and len(moments) == 1
        and row.step.dtype == torch.float32
        and all(x.device == device for x in row.written())
        and has_memory(row)
    )
    return kind if fits else None
