"""The step in Triton: launches the kernels of triton_kernels.py."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch

from fusedlr.backends import gpu
from fusedlr.backends.gpu.arguments import Arguments, NewArguments, StepArguments
from fusedlr.reference import Counters, GroupStep, Inputs, Row, Scope, Signals, Stepper

# what Triton itself supports
_MIN_ARCH = 80


@cache
def _kernels() -> Any:
    """The module with the kernels; importing Triton takes a while."""
    return import_module("fusedlr.backends.gpu.triton_kernels")


def _target() -> Any:
    """The device that Triton compiles for."""
    return import_module("triton").runtime.driver.active.get_current_target()


@cache
def _why_not_on(device_type: str) -> str | None:
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
    return gpu.why_not(devices, lambda device: _why_not_on(device.type))


def prepare(rows: Sequence[Row], counters: Counters, inputs: Inputs) -> Stepper:
    """A stepper for these rows: see `reference.Stepper`."""
    return gpu.prepare(rows, counters, inputs, TritonStepper)


class Launch(NamedTuple):
    """A launch of a kernel on the chunks of a bucket."""

    kernel: Any
    types: tuple[torch.dtype, ...]  # of parameters, and of moments where the kernel takes them
    amsgrad: bool
    master: bool  # whether the state has the rest of the parameters' fp32 values
    record: bool  # whether the step is recorded
    programs: int
    kept: tuple[Any, ...]  # arguments that are the same at every step


class TritonStepper:
    """The stages as launches of Triton's kernels."""

    def __init__(self, rows: Sequence[Row], counters: Counters, inputs: Inputs) -> None:
        self._arguments = StepArguments("triton", rows, counters, inputs)
        self._device = counters.k.device
        self._norms: list[Launch] = []
        self._updates: list[Launch] = []
        self._launches_for: Arguments | None = None

    def assign(self, groups: Sequence[GroupStep], scopes: Sequence[Scope]) -> None:
        """Take new options."""
        self._arguments.assign(groups, scopes)

    def norm(self, signals: Signals) -> None:
        """Write the scopes' sums of squares."""
        new = self._current(signals, norm=True)
        with self._arguments:
            self._launch_norms(new)

    def update(self, signals: Signals) -> None:
        """Decide, update and count."""
        self._arguments.increment_versions(signals)
        new = self._current(signals)
        with self._arguments:
            self._launch_updates(new)

    def step(self, signals: Signals) -> None:
        """Both stages, one after the other."""
        self._arguments.increment_versions(signals)
        new = self._current(signals)
        with self._arguments:
            self._launch_norms(new)
            self._launch_updates(new)

    def active(self) -> list[bool]:
        """Per group whether its scope has made the last step."""
        return self._arguments.active_groups

    def _launch_norms(self, new: NewArguments) -> None:
        for norm in self._norms:
            launch(norm, (new.gradients, new.active, new.grad_scale, *norm.kept), self._device)

    def _launch_updates(self, new: NewArguments) -> None:
        for update in self._updates:
            launch(update, (*new, *update.kept), self._device)

    def _current(self, signals: Signals, *, norm: bool = False) -> NewArguments:
        """What the launches of the step under way are given, after they are made anew where need be."""
        arguments = self._arguments.current()
        if arguments is not self._launches_for:
            self._norms, self._updates = _launches(arguments)
            self._launches_for = arguments
        return self._arguments.new(signals, table=True, norm=norm)


def _launches(a: Arguments) -> tuple[list[Launch], list[Launch]]:
    """The launches of the norm and of the update, one of each per bucket, with their arguments in order."""
    kernels, norms, updates = _kernels(), [], []
    kept: tuple[Any, ...]
    for bucket in a.layout.buckets:
        types = tuple(kernels.TYPES[dtype] for dtype in bucket.kind)
        order = a.made_for, bucket.first, a.layout.programs
        if a.normed:
            kept = a.tensors, a.chunks, a.ints, a.squares, a.partials, a.tickets, a.generation
            kept += *order, a.groups, a.scopes, types[0]
            norms.append(
                Launch(kernels.norm_kernel, bucket.kind[:1], False, False, False, bucket.programs, kept)
            )
        kept = a.tensors, a.chunks, a.ints, a.floats, a.rates, a.counts, a.used, a.squares, a.tickets
        kept += a.generation, a.ring, *order, a.groups, a.scopes, a.phases, a.rows, *types
        flags = bucket.amsgrad, bucket.master, a.recorded is not None
        updates.append(Launch(kernels.step_kernel, bucket.kind, *flags, bucket.programs, (*kept, *flags)))
    return norms, updates


# a kernel, its types and its device -> what Triton has compiled for them
_compiled: dict[Any, Any] = {}


def launch(launch: Launch, arguments: tuple[Any, ...], device: torch.device) -> None:
    """Launch a kernel; from the second time on without Triton's look at every argument.

    No value is compiled in, so what was compiled once is right for all that follows. That look, a key from
    types and values of twenty arguments, is most of a launch.
    """
    flags = launch.amsgrad, launch.master, launch.record
    key = launch.kernel, launch.types, *flags, device
    compiled = _compiled.get(key)
    if compiled is None:
        options = _options(device.type, *flags)
        launched = launch.kernel[(launch.programs,)](*arguments, **options)
        # None in the interpreter; Triton 3.9 may compile in the background
        wait = getattr(launched, "result", None)
        _compiled[key] = launched if wait is None else wait()
    else:
        compiled[(launch.programs, 1, 1)](*arguments)


@cache
def _options(device_type: str, amsgrad: bool, master: bool, record: bool) -> dict[str, Any]:
    if device_type == "cpu":
        return {}
    return _kernels().options(_target(), amsgrad, master, record)
