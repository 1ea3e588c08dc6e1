"""How the modules are compiled: the ninja file that setup.py runs, and the header that it needs. No torch."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
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
    ISAS["avx2"] = "-mavx2"
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
    FLAGS += " -DFUSEDLR_X86"
# darwin is untried
LINK = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
# as in C++: no fused products, and divisions and roots as IEEE has them
NVCC_FLAGS = "-std=c++17 -O3 -fmad=false -prec-div=true -prec-sqrt=true -ftz=false"
# compressed machine code takes an eighth of the space
NVCC_OPTIONS = "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall -Xfatbin -compress-all"
# namespace -> type of the parameters: csrc/cuda/step.cu is compiled once for each
CUDA_TYPES = {"f32": "float", "bf16": "BF16", "f16": "F16"}
# Turing to Blackwell, as far as an nvcc goes; the last one's PTX is for what comes later
CUDA_ARCHS = (75, 80, 86, 89, 90, 100, 120)
# the first whose launches carry 32 KB of parameters
MIN_CUDA = (12, 1)


class Unavailable(Exception):
    """A compiler is missing, or is no good."""


def openmp() -> str:
    """The flag for OpenMP; empty where the compiler has none (Apple's): the kernel then has one thread."""
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    with tempfile.TemporaryDirectory() as folder:
        target = shlex.quote(os.path.join(folder, "probe"))
        command = f"{CXX} {CXXFLAGS} -x c++ -fopenmp - {LDFLAGS} -o {target}"
        probe = subprocess.run(command, shell=True, input=program, text=True, capture_output=True)
    return "" if probe.returncode else "-fopenmp"


def nvcc() -> str:
    """How nvcc is called: $NVCC, or the one in PATH, $CUDA_HOME or /usr/local/cuda."""
    if os.environ.get("NVCC"):
        return os.environ["NVCC"]
    homes = os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"
    found = shutil.which(
        "nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), *(f"{h}/bin" for h in homes if h)])
    )
    if found is None:
        raise Unavailable("there is no nvcc in PATH, $CUDA_HOME or /usr/local/cuda")
    return shlex.quote(found)


def cuda_archs(nvcc: str) -> list[int]:
    """What to compile for: FUSEDLR_CUDA_ARCHS, or all of CUDA_ARCHS that this nvcc knows."""
    said = subprocess.run(
        f"{nvcc} --version && {nvcc} --list-gpu-code", shell=True, text=True, capture_output=True
    )
    release = re.search(r"release (\d+)\.(\d+)", said.stdout)
    if said.returncode or not release or tuple(map(int, release.groups())) < MIN_CUDA:
        raise Unavailable(f"{nvcc} is no nvcc of CUDA {MIN_CUDA[0]}.{MIN_CUDA[1]} or newer")
    known = set(map(int, re.findall(r"\bsm_(\d+)\b", said.stdout)))
    asked = re.findall(r"[^ ,;]+", os.environ.get("FUSEDLR_CUDA_ARCHS", ""))
    wrong = [arch for arch in asked if not arch.isdecimal() or int(arch) not in known]
    if wrong:
        raise Unavailable(
            f"FUSEDLR_CUDA_ARCHS={' '.join(wrong)}: {nvcc} knows {' '.join(map(str, sorted(known)))}"
        )
    return sorted(set(map(int, asked)) or known.intersection(CUDA_ARCHS))


def gencode(archs: list[int]) -> str:
    """The flags for machine code of these architectures, and PTX of the last."""
    codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*codes, f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


def _host() -> dict[str, tuple[str, str]]:
    sources = ("module", "watch", "torch_access")
    return {f"host_{name}.o": (f"host/{name}.cpp", "$python") for name in sources}


def _cpu() -> dict[str, tuple[str, str]]:
    objects = {"cpu_module.o": ("cpu/module.cpp", "$python")}
    for isa, flags in ISAS.items():
        objects[f"kernel_{isa}.o"] = "cpu/kernel.cpp", f"-DFUSEDLR_ISA={isa} {flags}"
    return {**objects, "cpu_step.o": ("cpu/step.cpp", "")}


def _cuda(archs: list[int]) -> dict[str, tuple[str, str]]:
    objects = {
        f"cuda_{name}.o": ("cuda/step.cu", f"-DFUSEDLR_TYPE={type_} -DFUSEDLR_NAME={name} {gencode(archs)}")
        for name, type_ in CUDA_TYPES.items()
    }
    listed = f"""'-DFUSEDLR_ARCHS="{" ".join(map(str, archs))}"'"""
    return {
        **objects,
        "cuda_module.o": ("cuda/module.cpp", f"$python {listed}"),
        "cuda_device.o": ("cuda/device.cu", ""),
    }


def ninja_file(outputs: dict[str, Path], digest: str) -> str:
    """The build of the modules `_host`, `_cpu` and `_cuda`, as far as `outputs` names their files.

    Objects do not depend on each other, so all compilers run at once; the slowest come first. It is run in a
    folder that has `columns.h`.

    Raises:
        Unavailable: nvcc is needed and is not there.
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
        "rule link_cpu",
        f"  command = {dollars(CXX)} $in {LINK} {more} {dollars(LDFLAGS)} -o $out",
    ]
    objects = {}
    if "_cuda" in outputs:
        compiler = nvcc()
        objects["_cuda"] = _cuda(cuda_archs(compiler))
        # the compiler that the rest is compiled by
        host = f" -ccbin {shlex.quote(shlex.split(CXX)[0])}" if os.environ.get("CXX") else ""
        compiler = dollars(compiler + host)
        lines += [
            "rule compile_cuda",
            f"  command = {compiler} {NVCC_FLAGS} {NVCC_OPTIONS} -I. $more -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link_cuda",
            f"  command = {compiler} $in -shared -cudart static -o $out",
        ]
    if "_cpu" in outputs:
        objects["_cpu"] = _cpu()
    if "_host" in outputs:
        objects["_host"] = _host()
    for module, own in objects.items():
        own[f"sources{module}.o"] = "sources.cpp", f"-DFUSEDLR_SOURCES={digest}"
        for name, (source, flags) in own.items():
            rule = "compile_cuda" if source.endswith(".cu") else "compile"
            lines += [f"build {name}: {rule} {escape(CSRC / source)}", f"  more = {flags}"]
        lines.append(f"build {escape(outputs[module])}: link{module} {' '.join(own)}")
    return "\n".join([*lines, ""])


def dollars(text: str) -> str:
    """`text` as ninja takes it literally."""
    return text.replace("$", "$$")


def escape(path: Path) -> str:
    """`path` as ninja takes it among inputs and outputs."""
    return dollars(str(path)).replace(" ", "$ ").replace(":", "$:")
