"""The step in Triton: launches the kernels of fusedlr/_triton.py on the tables of fusedlr/gpu.py."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch

from fusedlr import gpu
from fusedlr.gpu import Launch
from fusedlr.tables import Bucket

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
    return gpu.why_not(devices, lambda device: _not_here(device.type))


class Launcher(gpu.Launcher):
    """Launches Triton's kernels."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        # a launch's kernel, types and options -> what Triton compiled for them
        self._compiled: dict[Any, Any] = {}

    def _launch(self, launch: Launch) -> None:
        tables = launch.tensors, launch.gradients, launch.chunks, launch.ints
        shared = launch.norms, launch.tickets, launch.grad_scale
        norm_args = *tables, *shared, launch.alive
        step_args = (
            *tables,
            launch.floats,
            launch.counts,
            launch.used,
            *shared,
            launch.found_inf,
            launch.alive,
        )
        kernels, programs, groups = _kernels(), launch.layout.programs, launch.groups
        for bucket in launch.layout.buckets if launch.normed else ():
            params, _ = bucket.key
            rest = launch.now, bucket.first, programs, groups, kernels.TYPES[params]
            self._run(kernels.norm_kernel, bucket, (*norm_args, *rest), False)
        for bucket in launch.layout.buckets:
            params, moments = bucket.key
            amsgrad = bucket.key in launch.with_amsgrad
            lengths = launch.now, bucket.first, programs, groups, launch.phases, launch.rows
            types = kernels.TYPES[params], kernels.TYPES[moments], amsgrad
            self._run(kernels.step_kernel, bucket, (*step_args, *lengths, *types), amsgrad)

    def _run(self, kernel: Any, bucket: Bucket, args: tuple[Any, ...], amsgrad: bool) -> None:
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


step_ = partial(gpu.step_, Launcher)


@cache
def _options(device_type: str, amsgrad: bool) -> dict[str, Any]:
    if device_type == "cpu":
        return {}
    return _kernels().options(_target(), amsgrad)
