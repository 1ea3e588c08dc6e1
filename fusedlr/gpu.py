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
from operator import attrgetter, is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fusedlr import cpu, reference
from fusedlr.reference import Counters, GroupStep, Signals, TensorMath
from fusedlr.staging import Table, capturing
from fusedlr.tables import GROUP_INTS, PHASE_INTS, Bucket, Layout, pack_groups

# dtype of a parameter and its gradient, and of its moments
Kind = tuple[torch.dtype, torch.dtype]
# what a launch that only counts is compiled for
_DEFAULT_KIND = torch.float32, torch.float32
_KINDS = {
    (p, moments) for p in (torch.float32, torch.bfloat16, torch.float16) for moments in {torch.float32, p}
}
# what Triton itself supports
_MIN_ARCH = 80

_dtype = attrgetter("dtype")
_of_counters = attrgetter("k", "skipped", "skips_in_row", "lr", "grad_norm", "coef")


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
        # blocks that the counters' fields are rows of
        self._counters = torch.empty(0)
        self._used = self._norms = self._rates = torch.empty(0)
        self._adopted: tuple[Tensor, ...] = ()
        self._key: Any = None
        self._layout = Layout([], [], [], 0)
        # arguments of captured launches
        self._captured: list[Any] = []
        self._packed_from: tuple[Any, ...] = ()
        self._packed: tuple[list[int], list[float], int] = [], [], 0

    def arrange(
        self,
        sizes: Sequence[int],
        kinds: Sequence[Kind],
        counts: Sequence[int],
        amsgrad: Sequence[bool],
        joint: bool,
    ) -> None:
        """Lay out the chunks of a step on these tensors; the next `counts[i]` of them are group i's."""
        key = (*sizes,), (*kinds,), (*counts,), (*amsgrad,), joint
        if key == self._key:
            return
        self._layout = Layout.of(sizes, kinds, counts, joint)
        self._with_amsgrad = {kind for kind, top in zip(kinds, amsgrad, strict=True) if top}
        self._sizes = sizes
        self._group_of = [i for i, count in enumerate(counts) for _ in range(count)]
        self._norms = torch.empty(
            len(counts) + self._layout.programs, dtype=torch.float32, device=self.device
        )
        self._key = key

    def adopt(self, counters: Counters) -> None:
        """Make the counters rows of blocks that the kernels write: int64, and fp32 for what a step used."""
        fields = _of_counters(counters)
        if len(fields) == len(self._adopted) and all(map(is_, fields, self._adopted)):
            return
        self._counters = torch.stack(fields[:3])
        self._used = torch.stack(fields[3:]).float()
        self._rates = torch.zeros_like(self._used[0])
        counters.k, counters.skipped, counters.skips_in_row = self._counters.unbind()
        counters.lr, counters.grad_norm, counters.coef = self._used.unbind()
        self._adopted = _of_counters(counters)

    def step(
        self,
        groups: Sequence[GroupStep],
        addresses: Sequence[Sequence[int]],
        signals: Signals,
        *,
        joint: bool,
    ) -> None:
        """Launch a step on the tensors last arranged: addresses of p, g, m, v, largest v, step."""
        p, g, m, v, tops, steps = addresses
        tops = tops or [0] * len(p)
        rows = chain.from_iterable(zip(p, m, v, tops, steps, self._sizes, self._group_of, strict=True))
        ints, floats, phases = self._hyperparameters(groups, joint)
        own: dict[str, bool] = {"pinned_to_graph": True}
        tensors, grads = self._tensors.put(list(rows), **own), self._grads.put(g, **own)
        chunks = self._chunks.put(self._layout.chunks, **own)
        tables = tensors, grads, chunks, self._ints.put(ints)
        numbers = self._floats.put(floats)
        grad_scale = self._one if signals.grad_scale is None else self._fp32(signals.grad_scale)
        found_inf = self._zero if signals.found_inf is None else self._flag(signals.found_inf)
        normed = any(group.max_grad_norm is not None or group.skip_nonfinite for group in groups)
        programs, count = self._layout.programs, len(groups)
        norm_args = *tables, self._norms, self._tickets, grad_scale
        blocks = numbers, self._counters, self._used
        step_args = *tables, *blocks, self._norms, self._tickets, grad_scale, found_inf
        if capturing(self.device):
            # a replay reads them long after the next step has got others
            self._captured.append((norm_args, step_args))
        kernels = _kernels()
        try:
            with self._guard():
                for bucket in self._layout.buckets if normed else ():
                    params, _ = bucket.key or _DEFAULT_KIND
                    rest = bucket.first, programs, count, kernels.TYPES[params]
                    self._launch(kernels.norm_kernel, bucket, (*norm_args, *rest), False)
                for bucket in self._layout.buckets:
                    params, moments = bucket.key or _DEFAULT_KIND
                    amsgrad = bucket.key in self._with_amsgrad
                    types = kernels.TYPES[params], kernels.TYPES[moments], amsgrad
                    lengths = bucket.first, programs, count, phases, len(p)
                    self._launch(kernels.step_kernel, bucket, (*step_args, *lengths, *types), amsgrad)
        except BaseException:
            # some launches took tickets, and the last one of them will not come
            self._tickets.zero_()
            raise

    def _launch(self, kernel: Any, bucket: Bucket, args: tuple[Any, ...], amsgrad: bool) -> None:
        kernel[(bucket.programs,)](*args, **_options(self.device.type, amsgrad))

    def _hyperparameters(
        self, groups: Sequence[GroupStep], joint: bool
    ) -> tuple[list[int], list[float], int]:
        """What `pack_groups` makes of the groups, and the number of phases; packed when a value changes."""
        addresses = [self._rate(group) for group in groups]
        key = [cpu._of_group(group) for group in groups], addresses, joint, self._layout
        if key != self._packed_from:
            ints, floats = pack_groups(groups, self._layout, addresses, joint)
            phases = (len(ints) - len(groups) * len(GROUP_INTS)) // len(PHASE_INTS)
            self._packed_from, self._packed = key, (ints, floats, phases)
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


# belongs to an optimizer for as long as its counters do
_launchers: WeakKeyDictionary[TensorMath, Launcher] = WeakKeyDictionary()


@torch.no_grad()
def step_(groups: Sequence[GroupStep], counters: Counters, signals: Signals, *, joint: bool) -> None:
    """Make one optimizer step, in place: see `reference.step_`."""
    rows = [row for group in groups for row in group.rows]
    ordered = [cpu._in_order(row) for row in rows]
    columns = cpu._Columns(ordered, any(group.amsgrad for group in groups))
    device = counters.k.device
    kinds = _kinds(columns, device)
    if kinds is None:
        reference.step_(groups, counters, signals, joint=joint)
        return
    launcher = _launchers.get(counters.math)
    if launcher is None or launcher.device != device:
        launcher = _launchers[counters.math] = Launcher(device)
    sizes = list(map(Tensor.numel, columns.params))
    counts = [len(group.rows) for group in groups]
    launcher.arrange(
        sizes, kinds, counts, [top is not None for top in columns.tops] or [False] * len(rows), joint
    )
    launcher.adopt(counters)
    # autograd must know, so that a backward through values from before the step raises
    torch.autograd.graph.increment_version(chain(columns.written(), _of_counters(counters)))
    launcher.step(groups, columns.addresses, signals, joint=joint)
    cpu._copy_back(rows, ordered)


def _kinds(columns: cpu._Columns, device: torch.device) -> list[Kind] | None:
    """The bucket of every tensor, or None if there is no kernel for one of them or it is elsewhere."""
    moments = list(map(_dtype, columns.exp_avgs))
    kinds = list(zip(map(_dtype, columns.params), moments, strict=True))
    fits = (
        set(kinds) <= _KINDS
        and moments == list(map(_dtype, columns.exp_avg_sqs))
        and all(top is None or top.dtype == m for top, m in zip(columns.tops, moments, strict=False))
        and all(step.dtype == torch.float32 for step in columns.steps)
        and all(x.device == device for x in columns.written())
        and not columns.lack_memory()
    )
    return kinds if fits else None


@cache
def _options(device_type: str, amsgrad: bool) -> dict[str, Any]:
    if device_type == "cpu":
        return {}
    return _kernels().options(_target(), amsgrad)
