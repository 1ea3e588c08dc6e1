"""Where the machine meets the project: how kernels are compiled, how they are launched, what they touch.

Nothing else in this folder knows how a step is launched. The host code is the project's own: it lays out
tables on CPU tensors and launches as on a GPU, CUDA kernels through `fusedlr._cuda`, whose CUDA runtime is
the machine, and Triton's through `triton_step.Launcher._run`, which is replaced.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import cuda_compile
from cuda_compile import CSRC, recipe
from torch import Tensor

from fusedlr import backends, compiled, cuda_step, gpu, triton_step

from . import build
from .machine import Machine

ARCHS = (80, 90)
BACKENDS = ("cuda", "triton")

# kernel -> its PTX; of CUDA's all kernels of one type of parameters together
Texts = dict[str, str]
# name and PTX -> PTX to run in its place
Edit = Callable[[str, str], str]


def why_not() -> dict[str, str | None]:
    """By backend why its kernels cannot be compiled here, or None."""
    missing = "needs the tree" if not CSRC.is_dir() else None
    return {"cuda": missing or _why_not_cuda(), "triton": missing or _why_not_triton()}


def _why_not_cuda() -> str | None:
    return cuda_compile.why_not() if importlib.util.find_spec("pybind11") else "pybind11 is not installed"


def _why_not_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def compile_cuda(library: Path) -> Path:
    """`_cuda.so` as setup.py has it built, but for the runtime, and TYPE/cuda.compute_ARCH.ptx."""
    import pybind11

    runtime = build.HERE / "machine" / "device.cpp"
    nvcc = [*shlex.split(recipe().nvcc()), *recipe().NVCC_FLAGS.split(), *shlex.split(recipe().NVCC_OPTIONS)]
    for arch in ARCHS:
        nvcc += ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
    includes = [CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    gcc = ["g++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", *(f"-I{path}" for path in includes)]
    sources = {
        "module.o": [CSRC / "cuda_module.cpp", f'-DFUSEDLR_ARCHS="{" ".join(map(str, ARCHS))}"'],
        "sources.o": [CSRC / "sources.cpp", "-DFUSEDLR_SOURCES=0"],
        "device.o": [runtime],
    }

    def make(folder: Path) -> None:
        commands = []
        for name, type_ in recipe().CUDA_TYPES.items():
            (folder / name).mkdir()
            defined = [f"-DFUSEDLR_TYPE={type_}", f"-DFUSEDLR_NAME={name}"]
            command = [*nvcc, "--keep", "--keep-dir", folder / name, *defined]
            commands.append([*command, "-c", CSRC / "cuda.cu", "-o", f"{name}.o"])
        commands += [[*gcc, "-c", *source, "-o", name] for name, source in sources.items()]
        build.run_all(commands, folder)
        objects = [*(f"{name}.o" for name in recipe().CUDA_TYPES), *sources]
        # the library is in this process already when the module is loaded
        build.run(
            ["g++", "-shared", *objects, library, f"-Wl,-rpath,{library.parent}", "-o", "_cuda.so"], folder
        )

    files = [path for path in CSRC.iterdir() if path.is_file()]
    return build.once("cuda", [*files, runtime], make, of=" ".join(map(str, [*nvcc, library])))


def compile_triton(other: Path | None = None) -> Path:
    """The PTX of Triton's kernels, and launches.json, by the Triton in this environment or one in a folder.

    In a process of its own: one that interprets cannot compile.
    """
    tests, package = build.HERE.parent, build.ROOT / "fusedlr"
    path = ":".join(map(str, [*([other] if other else []), build.ROOT, *sys.path[1:]]))
    command = [sys.executable, tests / "triton_compile.py", *(f"sm_{arch}" for arch in ARCHS), "--ptx", "."]
    environment = {"PYTHONPATH": path, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": "cache"}
    version = str(other) if other else import_module("importlib.metadata").version("triton")
    used = [*package.glob("_triton*.py"), *(package / f"{x}.py" for x in ("tables", "schedule", "reference"))]
    return build.once(
        "triton-other" if other else "triton",
        [*used, tests / "triton_compile.py"],
        lambda folder: build.run(command, folder, **environment),
        of=version,
    )


def compile_all(names: tuple[str, ...] = BACKENDS, other: Path | None = None) -> None:
    """Build whatever a driver needs, two things at a time."""
    with ThreadPoolExecutor(2) as pool:
        triton = pool.submit(compile_triton, other) if "triton" in names else None
        library = build.machine()
        if "cuda" in names:
            compile_cuda(library)
        if triton is not None:
            triton.result()


def kernel_name(symbol: str) -> str:
    """A kernel in words, by the name that the machine has for it."""
    if symbol.startswith("triton"):
        return symbol
    params = re.findall(r"fusedlr\d(f32|bf16|f16)", symbol)[0]
    return f"cuda {params}: {cuda_compile.kernel_name(symbol)}"


def counters(optimizer: Any) -> Any:
    """The counters on the device: see fusedlr.reference.Counters."""
    return optimizer._counters


def set_steps(optimizer: Any, steps: list[int]) -> None:
    """Let every group of an optimizer be at a step."""
    optimizer._set_k(steps)


@cache
def installed() -> Driver:
    """What this process uses, made at the first call: tests of host code, and of numbers, run on it."""
    return Driver()


class Driver:
    """Both backends on the machine, for tensors on the CPU, in this process.

    Launches may touch all memory until `watch_launches` is called: tests of host code launch in ways of their
    own.
    """

    def __init__(self, names: tuple[str, ...] = BACKENDS, other: Path | None = None) -> None:
        self.missing = {name: why for name, why in why_not().items() if name in names and why is not None}
        self.names = tuple(name for name in names if name not in self.missing)
        if not self.names:
            return
        compile_all(self.names, other)
        library = build.machine()
        self.machine = Machine(library)
        # the step that is being launched: its launcher, arguments and rows, and rates that are tensors
        self._launcher: Any = None
        self._launch: Any = None
        self._rows: list[Any] = []
        self._rates: list[Tensor] = []
        self._errors: list[str] = []
        if "cuda" in self.names:
            self._cuda = compile_cuda(library)
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
            found.append(f"nvcc {cuda_compile.release()}")
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
            for name in recipe().CUDA_TYPES:
                found[f"cuda {name}"] = (self._cuda / name / f"cuda.compute_{arch}.ptx").read_text()
        if "triton" in self.names:
            for name in self._described["kernels"]:
                if name.endswith(f"sm_{arch}"):
                    found[f"triton {name.rsplit(' ', 1)[0]}"] = (self._triton / f"{name}.ptx").read_text()
        return found

    def use(self, arch: int, edit: Edit = lambda name, text: text) -> None:
        """Run the kernels of this architecture, or what `edit` makes of them."""
        self._arch = arch
        for name, text in self.texts(arch).items():
            alias = f"{name} sm_{arch}" if name.startswith("triton") else ""
            self.machine.activate(edit(name, text), alias)

    def coverage(self, backend: str) -> dict[str, tuple[int, int]]:
        """By kernel that can be launched now: instructions that have run in some launch, and all."""
        found = self.machine.coverage()
        if backend == "cuda":
            return {name: of for name, of in found.items() if name.startswith("_Z")}
        return {name: of for name, of in found.items() if name.endswith(f"sm_{self._arch}")}

    # launches

    def _install_cuda(self) -> None:
        # by a name of its own: pybind11 keeps modules by name
        spec = importlib.util.spec_from_file_location("ptx._cuda", self._cuda / "_cuda.so")
        assert spec is not None and spec.loader is not None
        compiled.cuda, compiled.cuda_error = importlib.util.module_from_spec(spec), None
        spec.loader.exec_module(compiled.cuda)
        # who has asked before has been told of another module
        cuda_step._not_here.cache_clear()

    def _install_triton(self) -> None:
        elsewhere = triton_step._not_here
        triton_step._not_here = lambda device: None if device == "cpu" else elsewhere(device)
        triton_step.Launcher._run = lambda launcher, *arguments: self._run_triton(*arguments)

    def _run_triton(self, kernel: Any, bucket: Any, args: tuple[Any, ...], amsgrad: bool) -> None:
        """Launch as Triton does: addresses and 32-bit numbers, in the order of the kernel's arguments."""
        types = [str(x) for x in args if type(x).__name__ == "dtype"]
        kind = kernel.fn.__name__.removesuffix("_kernel")
        moments = types[1] if kind == "step" else None
        name = f"{kind} {types[0]} {moments} {amsgrad} sm_{self._arch}"
        packed = b""
        for x in args:
            if isinstance(x, Tensor):
                packed += bytes(-len(packed) % 8) + struct.pack("<Q", x.data_ptr())
            elif type(x) is int:
                packed += struct.pack("<i", x)
        facts = self._described["kernels"][name]
        self.machine.launch(f"triton {name}", bucket.programs, facts["threads"], packed, facts["shared"])

    def launch_outdated(self, times: int) -> None:
        """Launch the last step as a CUDA graph would that was captured before its tensors moved."""
        launch = self._launch
        self._launcher.outdate()
        for _ in range(times):
            self._launcher._queue(self._launcher._launch, launch)

    def launch_again(self) -> None:
        """Launch the last step as it would be by now."""
        launch = self._launch._replace(now=self._launcher._generation.number)
        self._launcher._queue(self._launcher._launch, launch)

    def tickets(self) -> Tensor:
        """Those taken in the last step, which its last launch has handed back."""
        return self._launch.tickets

    # what a launch may touch

    def watch_launches(self) -> None:
        """From now on, let a launch touch what its step is about, and nothing else."""
        arrange, step, queue = gpu.Launcher.arrange, gpu.Launcher.step, gpu.Launcher._queue

        def arranged(launcher: Any, rows: Any, *rest: Any) -> None:
            self._rows = list(rows)
            arrange(launcher, rows, *rest)

        def stepped(launcher: Any, groups: Any, *arguments: Any, **options: Any) -> None:
            self._rates = [group.lr for group in groups if isinstance(group.lr, Tensor)]
            step(launcher, groups, *arguments, **options)

        def queued(launcher: Any, launch: Any, *arguments: Any) -> None:
            self._launcher = launcher
            if arguments and isinstance(arguments[0], gpu.Launch):
                self._launch = arguments[0]
            # nothing has been written to them in this step
            self.machine.undefine(self._launch.norms)
            queue(launcher, launch, *arguments)

        gpu.Launcher.arrange, gpu.Launcher.step, gpu.Launcher._queue = arranged, stepped, queued
        self.machine.before_launch(self._give_memory)

    def _give_memory(self) -> None:
        try:
            self.machine.forget_memory()
            given: set[int] = set()
            for name, x in self._memory():
                if x is not None and x.data_ptr() not in given:
                    given.add(x.data_ptr())
                    self.machine.give(x, name, tracked=name == "norms")
        except Exception as error:
            # it would be lost in the library that calls this
            self._errors.append(f"other: {error!r} before a launch")

    def _memory(self) -> Iterator[tuple[str, Tensor | None]]:
        """All tensors that the step's launches may touch."""
        for name, x in zip(self._launch._fields, self._launch, strict=True):
            if isinstance(x, Tensor):
                yield name, x
        yield "rates", self._launcher._rates
        for i, row in enumerate(self._rows):
            for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"):
                yield f"{name}[{i}]", getattr(row, name)
            # a step that repeats the last one has new gradients; a row that is a copy has no other
            yield f"grad[{i}]", row.grad if row.param.grad is None else row.param.grad
        for i, rate in enumerate(self._rates):
            yield f"lr[{i}]", rate
