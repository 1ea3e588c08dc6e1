"""Builds the compiled modules from csrc/; metadata lives in pyproject.toml.

FUSEDLR_CPU=auto|0|1: fusedlr._cpu if it can be built (the default), never, or else fail.
CXX, CXXFLAGS and LDFLAGS are the compiler, with arguments if need be, and more flags.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from fusedlr.sources import digest  # noqa: E402

WANTED = os.environ.get("FUSEDLR_CPU") or "auto"
if WANTED not in ("auto", "0", "1"):
    sys.exit(f"FUSEDLR_CPU={WANTED!r} is unknown, expected auto, 0 or 1")
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


def openmp():
    """The flag for OpenMP; empty where the compiler has none (Apple's): the kernel then has one thread."""
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    with tempfile.TemporaryDirectory() as folder:
        target = shlex.quote(os.path.join(folder, "probe"))
        command = f"{CXX} {CXXFLAGS} -x c++ -fopenmp - {LDFLAGS} -o {target}"
        probe = subprocess.run(command, shell=True, input=program, text=True, capture_output=True)
    return "" if probe.returncode else "-fopenmp"


def ninja_file(output):
    """The build of fusedlr._cpu: an object per source and instruction set, all at once, then the module."""
    import pybind11

    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    include = " ".join(f"-I{shlex.quote(str(path))}" for path in includes)
    # the slowest first
    objects = {f"{name}.o": (f"{name}.cpp", include) for name in ("cpu_module", "watch")}
    objects |= {
        f"kernel_{isa}.o": ("cpu_kernel.cpp", f"-DFUSEDLR_ISA={isa} {flags}") for isa, flags in ISAS.items()
    }
    objects |= {
        "cpu.o": ("cpu.cpp", ""),
        "sources.o": ("sources.cpp", f"-DFUSEDLR_SOURCES={digest(ROOT / 'csrc')}"),
    }
    more = openmp()
    lines = [
        f"cxx = {dollars(CXX)}",
        f"flags = {FLAGS} {more} {dollars(CXXFLAGS)}",
        "rule compile",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in {LINK} {more} {dollars(LDFLAGS)} -o $out",
    ]
    for name, (source, more) in objects.items():
        lines += [f"build {name}: compile {escape(ROOT / 'csrc' / source)}", f"  more = {dollars(more)}"]
    lines += [f"build {escape(output)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def dollars(text):
    return text.replace("$", "$$")


def escape(path):
    return dollars(str(path)).replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    def run(self):
        # should this build fail, the module of an earlier one must not be found
        for ext in self.extensions:
            path = Path(self.get_ext_filename(ext.name) if self.inplace else self.get_ext_fullpath(ext.name))
            (ROOT / path).unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext):
        if sys.platform == "win32":
            raise CompileError("the C++ kernel has not been tried on Windows: the package runs its reference")
        import ninja

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # not build_temp, which is another one for every editable build: ninja keeps what has not changed
        folder = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(output))
        if subprocess.call([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder)]):
            raise CompileError("the C++ kernel did not compile (see above): FUSEDLR_CPU=0 leaves it out")


class CleanBuild(build):
    def run(self):
        # what an earlier build left there would become part of the wheel
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    def run_command(self, command):
        super().run_command(command)
        built = Path(self.get_finalized_command("build").build_lib).rglob("_cpu.*")
        if command == "build" and not any(built):
            # for any Python and platform
            self.distribution.ext_modules = []
            self.root_is_pure = True


module = Extension("fusedlr._cpu", ["csrc/cpu_module.cpp"], optional=WANTED != "1")
setup(
    ext_modules=[] if WANTED == "0" else [module],
    cmdclass={"build_ext": NinjaBuild, "build": CleanBuild, "bdist_wheel": Wheel},
)
