"""The step in CUDA: launches the kernels of csrc/cuda/step.cu.

Gradients are allocated anew all the time; their addresses travel in the parameters of a launch, so a step
like the last one copies nothing to the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fusedlr.backends import compiled, gpu
from fusedlr.backends.compiled import TYPES
from fusedlr.backends.gpu.arguments import Arguments, NewArguments, StepArguments
from fusedlr.reference import Counters, GroupStep, Inputs, Row, Scope, Signals, Stepper, capturing

# the first that takes launches with 32 KB of parameters
_MIN_DRIVER = 12010


def archs() -> list[int]:
    """Compute capabilities with machine code inside, 90 for 9.0; newer GPUs compile the last one's PTX."""
    return list(map(int, compiled.cuda.archs.split()))


@cache
def _why_not_on(device: torch.device) -> str | None:
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
    return gpu.why_not(devices, _why_not_on)


def prepare(rows: Sequence[Row], counters: Counters, inputs: Inputs) -> Stepper:
    """A stepper for these rows: see `reference.Stepper`."""
    return gpu.prepare(rows, counters, inputs, CudaStepper)


class CudaStepper:
    """The stages as launches of `fusedlr._cuda`."""

    def __init__(self, rows: Sequence[Row], counters: Counters, inputs: Inputs) -> None:
        self._arguments = StepArguments("cuda", rows, counters, inputs)
        self._device, self._inputs = counters.k.device, inputs
        # addresses in a table on the device, because a launch cannot carry as many
        self._in_table = len(rows) > compiled.cuda.most_gradients
        self._launcher: Any = None
        self._launcher_for: Arguments | None = None
        self._new: NewArguments | None = None

    def assign(self, groups: Sequence[GroupStep], scopes: Sequence[Scope]) -> None:
        """Take new options."""
        self._arguments.assign(groups, scopes)

    def norm(self, signals: Signals) -> None:
        """Write the scopes' sums of squares."""
        launcher, given = self._current(signals)
        with self._arguments:
            launcher.norm(*given)

    def update(self, signals: Signals) -> None:
        """Decide, update and count."""
        self._inputs.increment_versions()
        launcher, given = self._current(signals)
        with self._arguments:
            launcher.update(*given)

    def step(self, signals: Signals) -> None:
        """Both stages in one call."""
        self._inputs.increment_versions()
        launcher, given = self._current(signals)
        with self._arguments:
            launcher.step(*given)

    def active(self) -> list[bool]:
        """Per group whether its scope has made the last step."""
        return self._arguments.active_groups

    def _current(self, signals: Signals) -> tuple[Any, tuple[int, ...]]:
        """The launcher for the step under way, and what its calls are given."""
        arguments = self._arguments.current()
        if arguments is not self._launcher_for:
            self._launcher = launcher(arguments, table=self._in_table, load=not capturing(self._device))
            self._launcher_for = arguments
        # kept until the next step, because the launches are given addresses alone
        self._new = new = self._arguments.new(signals, table=self._in_table)
        return self._launcher, (
            self._inputs.gradients_at if new.gradients is None else new.gradients.data_ptr(),
            new.active.data_ptr(),
            new.grad_scale.data_ptr(),
            new.found_inf.data_ptr(),
            torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0,
        )


def launcher(arguments: Arguments, *, table: bool, load: bool) -> Any:
    """The compiled launches; `load`: have the kernels' code loaded, which cannot be done during a capture."""
    buckets = []
    for bucket in arguments.layout.buckets:
        param, moments = map(TYPES.index, bucket.kind)
        buckets.append((param, moments, bucket.amsgrad, bucket.first, bucket.programs))
    tensors = {name: x.data_ptr() for name, x in arguments._asdict().items() if isinstance(x, Tensor)}
    return compiled.cuda.Launcher(
        **tensors,
        made_for=arguments.made_for,
        programs=arguments.layout.programs,
        groups=arguments.groups,
        scopes=arguments.scopes,
        phases=arguments.phases,
        rows=arguments.rows,
        normed=arguments.normed,
        buckets=buckets,
        table=table,
        load=load,
    )
