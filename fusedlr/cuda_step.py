"""The step in CUDA: launches the kernels of csrc/cuda.cu on the tables of fusedlr/gpu.py.

Gradients are allocated anew all the time; their addresses travel in the parameters of a launch, so a step
like the last one copies nothing to the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, partial
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fusedlr import compiled, gpu
from fusedlr.compiled import TYPES
from fusedlr.gpu import Launch
from fusedlr.plan import pack_of
from fusedlr.reference import GroupStep
from fusedlr.staging import capturing

# given anew to every step
_OF_A_STEP = ("gradients", "grad_scale", "found_inf")
# the first that takes launches with 32 KB of parameters
_MIN_DRIVER = 12010


def archs() -> list[int]:
    """Compute capabilities with machine code inside, 90 for 9.0; newer GPUs compile the last one's PTX."""
    return list(map(int, compiled.cuda.archs.split()))


@cache
def _not_here(device: torch.device) -> str | None:
    """Why the kernels do not run on this device in this process."""
    if compiled.cuda_error is not None:
        return compiled.cuda_error
    if device.type != compiled.cuda.device_type:
        return f"it does not run on {device.type}"
    if torch.version.hip is not None:
        return "it does not run on AMD GPUs"
    if device.type == "cpu":
        return None
    toolkit, driver = compiled.cuda.toolkit, compiled.cuda.driver()
    if driver == 0:
        return "there is no CUDA driver"
    try:
        return misfit(compiled.cuda.capability(device.index or 0), archs(), toolkit, driver)
    except RuntimeError as error:
        return f"CUDA says: {error}"


def misfit(capability: int, inside: list[int], toolkit: int, driver: int) -> str | None:
    """Why a GPU of this compute capability runs none of what is inside under this driver.

    The last architecture is inside as PTX too. Versions are CUDA's, 13000 for 13.0: a driver runs what
    toolkits of its major version and older ones compiled, but compiles PTX up to its own version only.
    """
    oldest = max(toolkit // 1000 * 1000, _MIN_DRIVER)
    if driver < oldest:
        return f"it needs a driver for CUDA {version(oldest)}, this one is for {version(driver)}"
    if any(arch // 10 == capability // 10 and arch <= capability for arch in inside):
        return None
    if capability < inside[-1]:
        there = ", ".join(map(dotted, inside))
        return f"this GPU has compute capability {dotted(capability)}, inside are {there}"
    if driver < toolkit:
        return (
            f"to compile for compute capability {dotted(capability)} it needs a driver for CUDA "
            f"{version(toolkit)}, this one is for {version(driver)}"
        )
    return None


def dotted(capability: int) -> str:
    """A compute capability as NVIDIA writes it: 9.0 for 90."""
    return f"{capability // 10}.{capability % 10}"


def version(number: int) -> str:
    """A version of CUDA in words: 13.0 for 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


def why_not(devices: Iterable[torch.device]) -> str | None:
    """Why the CUDA kernels cannot update tensors on these devices, or None if they can."""
    return gpu.why_not(devices, _not_here)


class Launcher(gpu.Launcher):
    """Launches the kernels of `fusedlr._cuda`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._given: Any = None
        self._launches: Any = None

    def _place_gradients(self, gradients: Any) -> Any:
        count = len(gradients) if isinstance(gradients, list) else gradients.count
        return gradients if count <= compiled.cuda.most_gradients else super()._place_gradients(gradients)

    def _launch(self, launch: Launch) -> None:
        kept = (x for name, x in zip(launch._fields, launch, strict=True) if name not in _OF_A_STEP)
        given = tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in kept)
        if given != self._given:
            self._given, self._launches = given, _launcher(launch, load=not capturing(self.device))
        rest = launch.grad_scale.data_ptr(), launch.found_inf.data_ptr(), self._stream()
        gradients = launch.gradients
        if isinstance(gradients, list):
            self._launches.step(gradients, *rest)
        elif isinstance(gradients, Tensor):
            self._launches.step_with_table(gradients.data_ptr(), *rest)
        else:
            self._launches.step_at(gradients.gradients_at, gradients.count, *rest)

    def repeat(self, groups: Sequence[GroupStep], param_groups: list[dict[str, Any]], watch: Any) -> Any:
        """The last step again: see `repeat`."""
        if watch.count > compiled.cuda.most_gradients:
            return None
        given = [(i, group.lr) for i, group in enumerate(groups) if isinstance(group.lr, float)]
        device, launches, count = self.device, self._launches, watch.count
        signals = self._one.data_ptr(), self._zero.data_ptr()

        def again(groups: list[dict[str, Any]], state: Any, threads: int) -> tuple[()] | None:
            if self._launches is not launches or len(groups) != len(param_groups):
                return None
            if not all(map(is_, groups, param_groups)) or capturing(device):
                return None
            for i, rate in given:
                # a tensor would have to be read
                if not isinstance(groups[i]["lr"], float) or groups[i]["lr"] != rate:
                    return None
            try:
                if not watch.same(groups, state):
                    return None
                watch.increment_versions()
                self._queue(launches.step_at, watch.gradients_at, count, *signals, self._stream())
            finally:
                watch.release()
            return ()

        return again

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0


def _launcher(launch: Launch, load: bool) -> Any:
    buckets = []
    for bucket in launch.layout.buckets:
        params, moments = bucket.key
        kind = TYPES.index(params), TYPES.index(moments), bucket.key in launch.with_amsgrad
        buckets.append((*kind, bucket.first, bucket.programs))
    return compiled.cuda.Launcher(
        tensors=launch.tensors.data_ptr(),
        chunks=launch.chunks.data_ptr(),
        ints=launch.ints.data_ptr(),
        floats=launch.floats.data_ptr(),
        counters=launch.counts.data_ptr(),
        used=launch.used.data_ptr(),
        norms=launch.norms.data_ptr(),
        tickets=launch.tickets.data_ptr(),
        alive=launch.alive.data_ptr(),
        now=launch.now,
        programs=launch.layout.programs,
        groups=launch.groups,
        phases=launch.phases,
        count=launch.rows,
        buckets=buckets,
        normed=launch.normed,
        load=load,
    )


step_ = partial(gpu.step_, Launcher)


def repeat(groups: Sequence[GroupStep], param_groups: list[dict[str, Any]], *, joint: bool) -> Any:
    """What makes the step just made again, where only gradients have changed; None if nothing does.

    It is called with `(param_groups, state, threads)`, and returns `()`, or None where more has changed:
    nothing has been done then. A scaler's signals are not for it, nor is the capture of a CUDA graph.
    """
    pack = pack_of(groups)
    if not isinstance(pack.kernel, Launcher) or any(isinstance(group.lr, Tensor) for group in groups):
        return None
    return pack.kernel.repeat(groups, param_groups, pack.watch)
