"""Where the machine meets the project: how kernels are compiled, how they are launched, what they touch.

Nothing else in this folder knows how a step is launched. The host code is the project's own: it lays out
tables on CPU tensors and launches as on a GPU, CUDA kernels through `fusedlr._cuda`, to which the machine is
CUDA's driver, and Triton's through `launch` of backends/gpu/triton.py, which is replaced.
"""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from gpu import cuda_compile
from torch import Tensor

from fusedlr import backends
from fusedlr.backends import compiled
from fusedlr.backends.gpu import cuda, kernels, triton
from fusedlr.backends.gpu.arguments import NewArguments, StepArguments
from fusedlr.backends.gpu.nvrtc import Compiled
from fusedlr.reference import Signals

from . import build
from .machine import Machine

ARCHS = (80, 90)
BACKENDS = ("cuda", "triton")
# what a step writes before it reads it
TRACKED = ("partials", "squares", "chunk_sums")

# kernel -> its PTX; of CUDA's all kernels of one type of parameters together
Texts = dict[str, str]
# name and PTX -> PTX to run in its place
Edit = Callable[[str, str], str]


def why_not() -> dict[str, str | None]:
    """By backend why its kernels cannot be compiled here, or run on the machine, or None."""
    triton = None if importlib.util.find_spec("triton") else "Triton is not installed"
    missing = build.why_not()
    return {"cuda": missing or compiled.cuda_error or cuda_compile.why_not(), "triton": missing or triton}


def compile_cuda(major: int | None = None) -> Path:
    """TYPE.compute_ARCH.ptx of the CUDA kernels, launches of both sizes together, and names.json.

    By the NVRTC that would be used, or by the one of a major version of CUDA.
    """
    nvrtc = cuda_compile.nvrtc(major)

    def make(folder: Path) -> None:
        wanted = [(name, arch) for name in kernels.TYPES for arch in ARCHS]
        with ThreadPoolExecutor(2) as pool:
            made = pool.map(
                lambda each: cuda_compile.compile_type(nvrtc, f"compute_{each[1]}", each[0]), wanted
            )
        names: dict[str, dict[str, str]] = {}
        for (name, arch), (image, own, *_) in zip(wanted, made, strict=True):
            (folder / f"{name}.compute_{arch}.ptx").write_bytes(image)
            names[name] = own
        (folder / "names.json").write_text(json.dumps(names))

    text, headers = kernels.sources()
    says = json.dumps([text, headers, kernels.OPTIONS, str(nvrtc)])
    return build.once(f"cuda{nvrtc.version[0]}", [Path(kernels.__file__)], make, of=says)


def compile_triton(other: Path | None = None) -> Path:
    """The PTX of Triton's kernels, and launches.json, by the Triton in this environment or one in a folder.

    In a process of its own: one that interprets cannot compile.
    """
    script, package = build.HERE.parent / "gpu" / "triton_compile.py", build.ROOT / "fusedlr"
    path = ":".join(map(str, [*([other] if other else []), build.ROOT, *sys.path[1:]]))
    command = [sys.executable, script, *(f"sm_{arch}" for arch in ARCHS), "--ptx", "."]
    environment = {"PYTHONPATH": path, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": "cache"}
    version = str(other) if other else import_module("importlib.metadata").version("triton")
    used = [script, *package.glob("backends/gpu/triton_*.py"), package / "schedule" / "phases.py"]
    used += [package / "columns.py", package / "reference.py"]
    return build.once(
        "triton-other" if other else "triton",
        used,
        lambda folder: build.run(command, folder, **environment),
        of=version,
    )


def compile_all(
    names: tuple[str, ...] = BACKENDS, other: Path | None = None, nvrtc: int | None = None
) -> None:
    """Build whatever a driver needs, two things at a time."""
    with ThreadPoolExecutor(2) as pool:
        triton = pool.submit(compile_triton, other) if "triton" in names else None
        build.machine()
        if "cuda" in names:
            compile_cuda(nvrtc)
        if triton is not None:
            triton.result()


def kernel_name(symbol: str) -> str:
    """A kernel in words, by the name that the machine has for it."""
    if symbol.startswith("triton"):
        return symbol
    return f"cuda {': '.join(cuda_compile.kernel_name(symbol))}"


def counters(optimizer: Any) -> Any:
    """The counters on the device: see fusedlr.reference.Counters."""
    return optimizer._counts.counters


def set_steps(optimizer: Any, steps: list[int]) -> None:
    """Let every group of an optimizer be at a step."""
    optimizer._counts.place(steps)


@cache
def installed() -> Driver:
    """What this process uses, made at the first call: tests of host code, and of numbers, run on it."""
    return Driver()


class Driver:
    """Both backends on the machine, for tensors on the CPU, in this process.

    Launches may touch all memory until `watch_launches` is called: tests of host code launch in ways of their
    own.
    """

    def __init__(
        self, names: tuple[str, ...] = BACKENDS, other: Path | None = None, nvrtc: int | None = None
    ) -> None:
        self.missing = {name: why for name, why in why_not().items() if name in names and why is not None}
        self.names = tuple(name for name in names if name not in self.missing)
        if not self.names:
            return
        compile_all(self.names, other, nvrtc)
        self.machine = Machine(build.machine())
        # the step that is being launched: who makes it, what its launches are given, and anew in every step
        self._stepper: Any = None
        self._arguments: Any = None
        self._new: NewArguments | None = None
        self._errors: list[str] = []
        if "cuda" in self.names:
            self._nvrtc = cuda_compile.nvrtc(nvrtc)
            self._cuda = compile_cuda(nvrtc)
            self._install_cuda()
        if "triton" in self.names:
            self._triton = compile_triton(other)
            self._described = json.loads((self._triton / "launches.json").read_text())
            self._install_triton()
        for name in self.names:
            # the last that `auto` would take: they are for those who ask for them by name
            backends.BACKENDS[name] = backends.BACKENDS.pop(name)
        self.use(ARCHS[-1])
        self.machine.give_everything()
        self.machine.order("straight", races=False)

    def compilers(self) -> str:
        """Whose PTX is run."""
        found = []
        if "cuda" in self.names:
            found.append(f"NVRTC {self._nvrtc}")
        if "triton" in self.names:
            found.append(f"Triton {self._described['version']}")
        return " and ".join(found)

    def take_reports(self) -> list[str]:
        """What has been found wrong since the last call: lines that begin with its kind."""
        lines, self._errors = self._errors + self.machine.take_reports(), []
        return lines

    # kernels

    def texts(self, arch: int) -> Texts:
        """The PTX of all kernels for one architecture, by names that begin with the backend's."""
        found = {}
        if "cuda" in self.names:
            for name in kernels.TYPES:
                found[f"cuda {name}"] = (self._cuda / f"{name}.compute_{arch}.ptx").read_text()
        if "triton" in self.names:
            for name in self._described["kernels"]:
                if name.endswith(f"sm_{arch}"):
                    found[f"triton {name.rsplit(' ', 1)[0]}"] = (self._triton / f"{name}.ptx").read_text()
        return found

    def use(self, arch: int, edit: Edit = lambda name, text: text) -> None:
        """Run the kernels of this architecture, or what `edit` makes of them."""
        self._arch = arch
        self.machine.unload()
        for name, text in self.texts(arch).items():
            alias = f"{name} sm_{arch}" if name.startswith("triton") else ""
            edited = edit(name, text)
            self.machine.activate(edited, alias, keep=edited == text)

    def coverage(self, backend: str) -> dict[str, tuple[int, int]]:
        """By kernel that can be launched now: instructions that have run in some launch, and all."""
        found = self.machine.coverage()
        if backend == "cuda":
            return {name: of for name, of in found.items() if name.startswith("_Z")}
        return {name: of for name, of in found.items() if name.endswith(f"sm_{self._arch}")}

    # launches

    def _install_cuda(self) -> None:
        # the library is in this process already, as the machine
        compiled.cuda.open_driver(str(build.machine()))
        names = json.loads((self._cuda / "names.json").read_text())
        cuda.images = lambda nvrtc, arch, size, **flags: {
            name: Compiled(b"", {kernel: names[name][kernel] for kernel in wanted}, "")
            for name in kernels.types(master=flags.get("master", False))
            for wanted in [kernels.kernel_names(name, size, **flags)]
        }
        cuda.device_type = "cpu"
        # who has asked before has been told of another device
        for told in (cuda._why_not_on, cuda.target_of, cuda.most_gradients):
            told.cache_clear()

    def _install_triton(self) -> None:
        elsewhere = triton._why_not_on
        triton._why_not_on = lambda device: None if device == "cpu" else elsewhere(device)
        triton.launch = lambda launch, arguments, device: self._run_triton(launch, arguments)

    def _run_triton(self, launch: triton.Launch, arguments: tuple[Any, ...]) -> None:
        """Launch as Triton does: addresses and 32-bit numbers, in the order of the kernel's arguments."""
        types = [str(x) for x in arguments if type(x).__name__ == "dtype"]
        kind = launch.kernel.fn.__name__.removesuffix("_kernel")
        moments = types[1] if kind == "step" else None
        flags = f"{launch.amsgrad} {launch.master} {launch.record}"
        name = f"{kind} {types[0]} {moments} {flags} sm_{self._arch}"
        packed = b""
        for x in arguments:
            if isinstance(x, Tensor):
                packed += bytes(-len(packed) % 8) + struct.pack("<Q", x.data_ptr())
            elif type(x) is int:
                packed += struct.pack("<i", x)
        facts = self._described["kernels"][name]
        self.machine.launch(f"triton {name}", launch.programs, facts["threads"], packed, facts["shared"])

    def launch_outdated(self, times: int) -> None:
        """Launch the last step as a CUDA graph would that was captured before its tensors moved."""
        stepper, graphs = self._stepper, self._arguments._graphs
        captured = stepper._current(Signals())
        graphs.pin("an earlier layout")
        graphs.expect("another layout")
        for _ in range(times):
            with self._arguments:
                if isinstance(stepper, cuda.CudaStepper):
                    launcher, given = captured
                    launcher.step(*given)
                else:
                    stepper._launch_norms(captured)
                    stepper._launch_updates(captured)

    def launch_again(self) -> None:
        """Launch the last step as it would be by now."""
        self._stepper.step(Signals())

    def tickets(self) -> Tensor:
        """Those taken in the last step, which its last launch has handed back."""
        return self._arguments._graphs.tickets

    # what a launch may touch

    def watch_launches(self) -> None:
        """From now on, let a launch touch what its step is about, and nothing else."""
        new, enter = StepArguments.new, StepArguments.__enter__

        def renewed(arguments: StepArguments, *given: Any, **options: Any) -> NewArguments:
            self._arguments, self._new = arguments, new(arguments, *given, **options)
            return self._new

        def entered(arguments: StepArguments) -> None:
            for name in TRACKED:
                # nothing has been written to it in this step
                self.machine.undefine(getattr(arguments._arguments, name))
            enter(arguments)

        StepArguments.new, StepArguments.__enter__ = renewed, entered  # type: ignore[method-assign]
        for kind in (cuda.CudaStepper, triton.TritonStepper):
            kind.step = self._noted(kind.step)  # type: ignore[method-assign]
        self.machine.before_launch(self._give_memory)

    def _noted(self, step: Callable[[Any, Signals], None]) -> Callable[[Any, Signals], None]:
        def noted(stepper: Any, signals: Signals) -> None:
            self._stepper = stepper
            step(stepper, signals)

        return noted

    def _give_memory(self) -> None:
        try:
            self.machine.forget_memory()
            given: set[int] = set()
            for name, x in self._memory():
                if x is not None and x.data_ptr() not in given:
                    given.add(x.data_ptr())
                    self.machine.give(x, name, tracked=name in TRACKED)
        except Exception as error:
            # it would be lost in the library that calls this
            self._errors.append(f"other: {error!r} before a launch")

    def _memory(self) -> Iterator[tuple[str, Tensor | None]]:
        """All tensors that the step's launches may touch."""
        step = self._arguments
        for some in (step._arguments, self._new):
            for name, x in some._asdict().items():
                if isinstance(x, Tensor):
                    yield name, x
        for i, row in enumerate(step._rows):
            own = {"param": row.param, "grad": row.param.grad, **row.state, "step": row.step}
            yield from ((f"{name}[{i}]", x) for name, x in own.items())
        for i, rate in step._rate_tensors:
            yield f"lr[{i}]", rate
        yield "copies of lr", step._copied_rates
        ring = step._arguments.recorded
        if ring is not None:
            yield from (("ring's " + name, getattr(ring, name)) for name in ("steps", "ints", "used", "sums"))
