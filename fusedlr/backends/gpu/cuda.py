"""The step in CUDA: launches the kernels of csrc/cuda/step.cu, which kernels.py compiles, through the driver.

Gradients are allocated anew all the time; their addresses travel in the parameters of a launch, so a step
like the last one copies nothing to the device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fusedlr.backends import compiled, gpu
from fusedlr.backends.gpu import kernels
from fusedlr.backends.gpu.arguments import Arguments, NewArguments, StepArguments
from fusedlr.backends.gpu.kernels import images
from fusedlr.backends.gpu.nvrtc import Nvrtc
from fusedlr.kept import has_rest
from fusedlr.reference import Counters, GroupStep, Inputs, Row, Scope, Signals, Stepper, capturing

# where tensors have to be; tests put a machine in the place of the driver, which works on the CPU's memory
device_type = "cuda"
# dtype of parameters or moments -> its name in kernels.py
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@cache
def _why_not_on(device: torch.device) -> str | None:
    """Why the kernels do not run on this device in this process."""
    if compiled.cuda_error is not None:
        return compiled.cuda_error
    if device.type != device_type:
        return f"it does not run on {device.type}"
    if torch.version.hip is not None:
        return "it does not run on AMD GPUs"
    try:
        found = target_of(device)
    except RuntimeError as error:
        return str(error)
    return found if isinstance(found, str) else None


@cache
def target_of(device: torch.device) -> tuple[Nvrtc, str] | str:
    """What compiles the kernels for a device, and for which architecture; or why nothing does.

    Raises:
        RuntimeError: there is no driver, or it fails.
    """
    return kernels.target(compiled.cuda.capability(device.index or 0), compiled.cuda.driver_version())


@cache
def most_gradients(device: torch.device) -> int:
    """The most gradients whose addresses a launch on this device carries."""
    found = target_of(device)
    many = not isinstance(found, str) and kernels.launches_many(found[0], compiled.cuda.driver_version())
    return compiled.cuda.many if many else compiled.cuda.few


# device, size, master, record -> kernel -> its handle; filled at the first step, outside of captures
_loaded: dict[tuple[torch.device, str, bool, bool], dict[str, int]] = {}
_loading = threading.Lock()


def functions(
    device: torch.device, size: str, *, master: bool = False, record: bool = False
) -> dict[str, int]:
    """The loaded kernels for launches of one size, by their names in C++; compiles and loads them once.

    Raises:
        RuntimeError: a CUDA graph is being captured, which allows neither; or the driver refuses the kernels.
        CompileError: NVRTC does not compile them.
    """
    key = device, size, master, record
    with _loading:
        if key not in _loaded:
            if capturing(device):
                raise RuntimeError(
                    "make one step outside the CUDA graph before capturing it: the kernels are compiled there"
                )
            found = target_of(device)
            assert not isinstance(found, str), found
            _loaded[key] = {
                name: handle
                for made in images(*found, size, master=master, record=record).values()
                for name, handle in zip(
                    made.names,
                    compiled.cuda.load(device.index or 0, made.image, list(made.names.values())),
                    strict=True,
                )
            }
        return _loaded[key]


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
        self._device = counters.k.device
        # addresses in a table on the device, because a launch cannot carry as many
        self._in_table = len(rows) > most_gradients(self._device)
        size = "few" if self._in_table or len(rows) <= compiled.cuda.few else "many"
        self._size, self._functions = size, functions(self._device, size)
        if counters.ring is not None:
            self._functions = {**self._functions, **functions(self._device, size, record=True)}
        if any(has_rest(row.names) for row in rows):
            flags = {"master": True, "record": counters.ring is not None}
            self._functions = {**self._functions, **functions(self._device, size, **flags)}
        self._launcher: Any = None
        self._launcher_for: Arguments | None = None
        self._new: NewArguments | None = None

    def assign(self, groups: Sequence[GroupStep], scopes: Sequence[Scope]) -> None:
        """Take new options."""
        self._arguments.assign(groups, scopes)

    def norm(self, signals: Signals) -> None:
        """Write the scopes' sums of squares."""
        launcher, given = self._current(signals, norm=True)
        with self._arguments:
            launcher.norm(*given)

    def update(self, signals: Signals) -> None:
        """Decide, update and count."""
        self._arguments.increment_versions(signals)
        launcher, given = self._current(signals)
        with self._arguments:
            launcher.update(*given)

    def step(self, signals: Signals) -> None:
        """Both stages in one call."""
        self._arguments.increment_versions(signals)
        launcher, given = self._current(signals)
        with self._arguments:
            launcher.step(*given)

    def active(self) -> list[bool]:
        """Per group whether its scope has made the last step."""
        return self._arguments.active_groups

    def _current(self, signals: Signals, *, norm: bool = False) -> tuple[Any, tuple[int, ...]]:
        """The launcher for the step under way, and what its calls are given."""
        arguments = self._arguments.current()
        if arguments is not self._launcher_for:
            self._launcher = launcher(arguments, self._functions, self._size, table=self._in_table)
            self._launcher_for = arguments
        # kept until the next step, because the launches are given addresses alone
        self._new = new = self._arguments.new(signals, table=self._in_table, norm=norm)
        return self._launcher, (
            self._arguments.gradients_at(norm) if new.gradients is None else new.gradients.data_ptr(),
            new.active.data_ptr(),
            new.grad_scale.data_ptr(),
            new.found_inf.data_ptr(),
            torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0,
        )


def launcher(arguments: Arguments, loaded: dict[str, int], size: str, *, table: bool) -> Any:
    """The compiled launches of a step; `table`: the gradients' addresses lie in a table on the device."""
    buckets = []
    for bucket in arguments.layout.buckets:
        param, moments = (_NAMES[dtype] for dtype in bucket.kind)
        norm = loaded[kernels.name_of_norm(param, size)]
        flags = {"master": bucket.master, "record": arguments.recorded is not None}
        update = loaded[kernels.name_of_step(param, moments, bucket.amsgrad, size, **flags)]
        buckets.append((norm, update, bucket.first, bucket.programs))
    tensors = {name: x.data_ptr() for name, x in arguments._asdict().items() if isinstance(x, Tensor)}
    # the ring's table has its address
    del tensors["chunk_sums"]
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
        few=size == "few",
        table=table,
        device=arguments.counts.device.index or 0,
    )
