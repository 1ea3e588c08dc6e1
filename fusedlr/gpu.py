"""The step in Triton: fills the tables of fusedlr/tables.py and launches the kernels of fusedlr/_triton.py.

`step_` has the signature and the meaning of `reference.step_`, and `Launcher` takes columns of tensors and
their addresses from whoever has them. What the kernels cannot read in place runs through the reference.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from itertools import chain
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fusedlr import reference
from fusedlr.order import copy_back, has_memory, in_order
from fusedlr.plan import pack_of
from fusedlr.reference import Counters, GroupStep, Row, Signals, TensorMath
from fusedlr.staging import Table, capturing
from fusedlr.tables import GROUP_INTS, PHASE_INTS, TENSORS, Bucket, Layout, pack_groups

# dtype of a parameter and its gradient, and of its moments
Kind = tuple[torch.dtype, torch.dtype]
# what a launch that only counts is compiled for
_DEFAULT_KIND = torch.float32, torch.float32
_KINDS = {
    (p, moments) for p in (torch.float32, torch.bfloat16, torch.float16) for moments in {torch.float32, p}
}
# what Triton itself supports
_MIN_ARCH = 80


@cache
def _kernels() -> Any:
    """The module with the kernels; importing Triton takes a while."""
    return import_module("fusedlr._triton")


def _target() -> Any:
    """The device that Triton compiles for."""
    return import_module("triton").runtime.driver.active.get_current_target()


@cache
def _not_here(device_type: str) -> str | None:
    """Why Triton does not run on this type of device in this process."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
    if device_type == "cpu" and not interpreted:
        return "on the CPU it runs in Triton's interpreter only, with TRITON_INTERPRET=1"
    if device_type not in ("cpu", "cuda", "xpu"):
        return f"it does not run on {device_type}"
    try:
        _kernels()
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton"
    if device_type == "cpu":
        return None
    if interpreted:
        return "TRITON_INTERPRET is set: the interpreter cannot follow addresses on a GPU"
    try:
        # builds Triton's launcher, which takes a C compiler and the device's driver
        target = _target()
    except Exception as error:
        return f"Triton finds no device to run on ({error})"
    if target.backend == "cuda" and target.arch < _MIN_ARCH:
        return f"Triton needs compute capability 8.0, this GPU has {target.arch / 10}"
    return None


def why_not(devices: Iterable[torch.device]) -> str | None:
    """Why the Triton kernels cannot update tensors on these devices, or None if they can."""
    devices = set(devices)
    if len(devices) > 1:
        return "it does not run on several devices at once"
    return next(filter(None, (_not_here(device.type) for device in devices)), None)


class Launcher:
    """What is kept of one optimizer from step to step: its tables on the device, and how to launch."""

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
        # a launch's kernel, types and options -> what Triton compiled for them
        self._compiled: dict[Any, Any] = {}

    def arrange(self, rows: Sequence[Row], kinds: Sequence[Kind], counts: Sequence[int], joint: bool) -> None:
        """Lay out a step on these rows, in order; the next `counts[i]` of them are group i's."""
        sizes = [row.param.numel() for row in rows]
        amsgrad = [row.max_exp_avg_sq is not None for row in rows]
        key = sizes, list(kinds), list(counts), amsgrad, joint
        if key != self._key:
            self._layout = Layout.of(sizes, kinds, counts, joint)
            self._with_amsgrad = {kind for kind, top in zip(kinds, amsgrad, strict=True) if top}
            length = len(counts) + self._layout.programs
            self._norms = torch.empty(length, dtype=torch.float32, device=self.device)
            self._key = key
        group_of = [i for i, count in enumerate(counts) for _ in range(count)]
        of = [_tensors(row, size, group) for row, size, group in zip(rows, sizes, group_of, strict=True)]
        if self._captured_rows and not self._captured_rows.issuperset(of):
            self._outdate()
        self._rows = list(chain.from_iterable(of))

    def step(
        self,
        groups: Sequence[GroupStep],
        gradients: list[int],
        counters: Counters,
        signals: Signals,
        *,
        joint: bool,
    ) -> None:
        """Launch a step on the rows last arranged, with gradients at these addresses."""
        counters.use_fp32()
        if self._rates.numel() != len(groups):
            self._rates = torch.zeros(len(groups), dtype=torch.float32, device=self.device)
        ints, floats, phases = self._hyperparameters(groups, joint)
        normed = any(group.max_grad_norm is not None or group.skip_nonfinite for group in groups)
        # captured launches share these two tables, new values included, while they are laid out alike
        frame = normed, phases, len(floats), self._layout.slots
        if self._captured_frame not in (None, frame):
            self._outdate()
        tensors = self._tensors.put(self._rows, pinned_to_graph=True)
        grads = self._grads.put(gradients, pinned_to_graph=True)
        chunks = self._chunks.put(self._layout.chunks, pinned_to_graph=True)
        tables = tensors, grads, chunks, self._ints.put(ints)
        numbers = self._floats.put(floats)
        scale, inf = signals.grad_scale, signals.found_inf
        grad_scale = self._one if scale is None else self._fp32(scale)
        found_inf = self._zero if inf is None else self._flag(inf)
        programs, count, now = self._layout.programs, len(groups), self._generation.number
        alive = self._generation.tensor
        norm_args = *tables, self._norms, self._tickets, grad_scale, alive
        blocks = numbers, counters.counts, counters.used
        step_args = *tables, *blocks, self._norms, self._tickets, grad_scale, found_inf, alive
        if capturing(self.device):
            # a replay reads them long after the next step has got others
            self._captured.append((norm_args, step_args, self._rates, [group.lr for group in groups]))
            self._captured_frame = frame
            width = len(TENSORS)
            self._captured_rows.update(zip(*(self._rows[i::width] for i in range(width)), strict=True))
        kernels = _kernels()
        try:
            with self._guard():
                for bucket in self._layout.buckets if normed else ():
                    params, _ = bucket.key or _DEFAULT_KIND
                    rest = now, bucket.first, programs, count, kernels.TYPES[params]
                    self._launch(kernels.norm_kernel, bucket, (*norm_args, *rest), False)
                for bucket in self._layout.buckets:
                    params, moments = bucket.key or _DEFAULT_KIND
                    amsgrad = bucket.key in self._with_amsgrad
                    types = kernels.TYPES[params], kernels.TYPES[moments], amsgrad
                    lengths = now, bucket.first, programs, count, phases, len(gradients)
                    self._launch(kernels.step_kernel, bucket, (*step_args, *lengths, *types), amsgrad)
        except BaseException:
            # some launches took tickets, and the last one of them will not come
            self._tickets.zero_()
            raise

    def _outdate(self) -> None:
        """Let the launches captured so far do nothing when they are replayed."""
        if capturing(self.device):
            # the device would hear of it in a replay only
            raise RuntimeError(
                "tensors have changed since the last step outside the CUDA graph: make one before capturing"
            )
        self._generation.advance()
        self._captured_rows.clear()
        self._captured_frame = None

    def _launch(self, kernel: Any, bucket: Bucket, args: tuple[Any, ...], amsgrad: bool) -> None:
        """Launch a kernel; from the second time on without Triton's look at every argument.

        No value is compiled in, so what was compiled once is right for all that follows. That look, a key
        from types and values of twenty arguments, is most of a launch.
        """
        key = kernel, bucket.key, amsgrad
        compiled = self._compiled.get(key)
        if compiled is None:
            options = _options(self.device.type, amsgrad)
            launched = kernel[(bucket.programs,)](*args, **options)
            # None in the interpreter; Triton 3.9 may compile in the background
            wait = getattr(launched, "result", None)
            self._compiled[key] = launched if wait is None else wait()
        else:
            compiled[(bucket.programs, 1, 1)](*args)

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
        """Make the tensors' device the current one, which Triton launches on."""
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
_launchers: WeakKeyDictionary[TensorMath, Launcher] = WeakKeyDictionary()


@torch.no_grad()
def step_(groups: Sequence[GroupStep], counters: Counters, signals: Signals, *, joint: bool) -> None:
    """Make one optimizer step, in place: see `reference.step_`."""
    pack = pack_of(groups)
    if isinstance(pack.kernel, Launcher):
        pack.watch.increment_versions()
        pack.kernel.step(groups, pack.watch.gradients, counters, signals, joint=joint)
        return
    rows = list(chain.from_iterable(group.rows for group in groups))
    ordered = list(map(in_order, rows))
    device = counters.counts.device
    kinds = [_kind(row, device) for row in ordered]
    if None in kinds:
        reference.step_(groups, counters, signals, joint=joint)
        return
    launcher = _launchers.get(counters.math)
    if launcher is None or launcher.device != device:
        launcher = _launchers[counters.math] = Launcher(device)
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


@cache
def _options(device_type: str, amsgrad: bool) -> dict[str, Any]:
    if device_type == "cpu":
        return {}
    return _kernels().options(_target(), amsgrad)
