"""How the modules are compiled: the ninja file that setup.py runs, and the header that it needs. No torch."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parent
CXX = os.environ.get("CXX") or "c++"
CXXFLAGS, LDFLAGS = os.environ.get("CXXFLAGS", ""), os.environ.get("LDFLAGS", "")
# contraction off: products are rounded as the reference rounds them; no fast-math, no -march=native
FLAGS = "-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden -fPIC -Wall"
# instruction set -> flags; the best that a machine has is chosen when the module is loaded
ISAS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    # processors without AVX2 are rare, and at -O3 this kernel would be the largest of the three
    ISAS["baseline"] = "-O2"
    ISAS["avx2"] = "-mavx2"
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
    FLAGS += " -DFUSEDLR_X86"
# what the CUDA kernels are compiled from where they run
KERNEL_SOURCES = ("schedule.h", "adamw.h", "guard.h", "types.h", "cuda/step.h", "cuda/step.cu")
# flags of the files that define what Python calls: -Os keeps the wheel below 1 MB, for 0.4 us of a 13 us step
CALLS = "$python -Os"
# without symbols, which are an eighth of a module; darwin is untried
LINK = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared -s"


def openmp() -> str:
    """The flag for OpenMP; empty where the compiler has none (Apple's): the kernel then has one thread."""
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    with tempfile.TemporaryDirectory() as folder:
        target = shlex.quote(os.path.join(folder, "probe"))
        command = f"{CXX} {CXXFLAGS} -x c++ -fopenmp - {LDFLAGS} -o {target}"
        probe = subprocess.run(command, shell=True, input=program, text=True, capture_output=True)
    return "" if probe.returncode else "-fopenmp"


def _host() -> dict[str, tuple[str, str]]:
    sources = ("module", "watch", "torch_access")
    return {
        f"host_{name}.o": (f"host/{name}.cpp", CALLS if name == "module" else "$python") for name in sources
    }


def _cpu() -> dict[str, tuple[str, str]]:
    objects = {"cpu_module.o": ("cpu/module.cpp", CALLS)}
    for isa, flags in ISAS.items():
        objects[f"kernel_{isa}.o"] = "cpu/kernel.cpp", f"-DFUSEDLR_ISA={isa} {flags}"
    return {**objects, "cpu_step.o": ("cpu/step.cpp", "")}


def _cuda() -> dict[str, tuple[str, str]]:
    return {"cuda_module.o": ("cuda/module.cpp", CALLS), "cuda_driver.o": ("cuda/driver.cpp", "")}


def ninja_file(outputs: dict[str, Path], digest: str) -> str:
    """The build of the modules `_host`, `_cpu` and `_cuda`, as far as `outputs` names their files.

    Objects do not depend on each other, so all compilers run at once; the slowest come first. It is run in a
    folder that has `columns.h`.
    """
    import pybind11

    includes = [CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    more = openmp()
    lines = [
        f"python = {dollars(' '.join(f'-I{shlex.quote(str(path))}' for path in includes))}",
        f"flags = {FLAGS} -I. {more} {dollars(CXXFLAGS)}",
        "rule compile",
        f"  command = {dollars(CXX)} $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link_host",
        f"  command = {dollars(CXX)} $in {LINK} {dollars(LDFLAGS)} -o $out",
        "rule link_cuda",
        f"  command = {dollars(CXX)} $in {LINK} -ldl {dollars(LDFLAGS)} -o $out",
        "rule link_cpu",
        f"  command = {dollars(CXX)} $in {LINK} {more} {dollars(LDFLAGS)} -o $out",
    ]
    objects = {"_cpu": _cpu(), "_host": _host(), "_cuda": _cuda()}
    for module in outputs:
        own = objects[module]
        own[f"sources{module}.o"] = "sources.cpp", f"-DFUSEDLR_SOURCES={digest}"
        for name, (source, flags) in own.items():
            lines += [f"build {name}: compile {escape(CSRC / source)}", f"  more = {flags}"]
        lines.append(f"build {escape(outputs[module])}: link{module} {' '.join(own)}")
    return "\n".join([*lines, ""])


def dollars(text: str) -> str:
    """`text` as ninja takes it literally."""
    return text.replace("$", "$$")


def escape(path: Path) -> str:
    """`path` as ninja takes it among inputs and outputs."""
    return dollars(str(path)).replace(" ", "$ ").replace(":", "$:")
