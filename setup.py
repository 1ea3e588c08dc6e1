"""Builds the compiled modules from csrc/; metadata lives in pyproject.toml.

FUSEDLR_CPU=auto|0|1: fusedlr._cpu if it can be built (the default), never, or else fail.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
WANTED = os.environ.get("FUSEDLR_CPU", "auto")
# contraction off: products are rounded as the reference rounds them; no fast-math, no -march=native
FLAGS = "-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden -fPIC -Wall"
# instruction set -> flags; the best that a machine has is chosen when the module is loaded
ISAS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = "-mavx2"
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
    FLAGS += " -DFUSEDLR_X86"
if sys.platform == "darwin":
    # untried. Apple's compiler has no OpenMP: one thread
    LINK = "-bundle -undefined dynamic_lookup"
else:
    FLAGS, LINK = FLAGS + " -fopenmp", "-shared -fopenmp"


def ninja_file(output):
    """The build of fusedlr._cpu: an object per source and instruction set, all at once, then the module."""
    import pybind11

    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    include = " ".join(f"-I{shlex.quote(str(path))}" for path in includes)
    # the slowest first
    objects = {f"{name}.o": (f"{name}.cpp", include) for name in ("cpu_module", "watch")}
    objects["cpu.o"] = ("cpu.cpp", "")
    objects |= {
        f"kernel_{isa}.o": ("cpu_kernel.cpp", f"-DFUSEDLR_ISA={isa} {flags}") for isa, flags in ISAS.items()
    }
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"flags = {FLAGS} {os.environ.get('CXXFLAGS', '')}",
        "rule compile",
        "  command = $cxx $flags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx $in {LINK} {os.environ.get('LDFLAGS', '')} -o $out",
    ]
    for name, (source, more) in objects.items():
        lines += [f"build {name}: compile {escape(ROOT / 'csrc' / source)}", f"  more = {more}"]
    lines += [f"build {escape(output)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    def run(self):
        # should this build fail, the module of an earlier one must not be found
        for folder in ("fusedlr", os.path.join(self.build_lib, "fusedlr")):
            for stale in (ROOT / folder).glob("_cpu*.so"):
                stale.unlink()
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


module = Extension("fusedlr._cpu", ["csrc/cpu_module.cpp"], optional=WANTED != "1")
setup(
    ext_modules=[] if WANTED == "0" else [module],
    cmdclass={"build_ext": NinjaBuild, "build": CleanBuild},
)
