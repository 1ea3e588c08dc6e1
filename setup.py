"""Builds the compiled modules from csrc/; metadata lives in pyproject.toml, how to compile in csrc/recipe.py.

FUSEDLR_CPU=auto|0|1: fusedlr._cpu if it can be built (the default), never, or else fail.
FUSEDLR_CUDA=auto|0|1: the same for fusedlr._cuda, which takes nvcc; FUSEDLR_CUDA_ARCHS="80 90" says for what.
fusedlr._host, which both need, is built with either.
CXX, CXXFLAGS, LDFLAGS and NVCC are the compilers, with arguments if need be, and more flags.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "csrc")]

import recipe  # noqa: E402

from fusedlr.columns import header  # noqa: E402
from fusedlr.sources import digest  # noqa: E402

# module -> what it is, and the variable that asks for it
MODULES = {
    "_host": ("compiled watch", "FUSEDLR_CPU"),
    "_cpu": ("C++ kernel", "FUSEDLR_CPU"),
    "_cuda": ("CUDA kernel", "FUSEDLR_CUDA"),
}
WANTED = {module: os.environ.get(variable) or "auto" for module, (_, variable) in MODULES.items()}
for module, wanted in WANTED.items():
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"{MODULES[module][1]}={wanted!r} is unknown, expected auto, 0 or 1")
WANTED["_host"] = max(WANTED["_cpu"], WANTED["_cuda"], key=("0", "auto", "1").index)


class NinjaBuild(build_ext):
    def run(self):
        # should this build fail or leave one out, the module of an earlier one must not be found
        for name in (f"fusedlr.{module}" for module in MODULES):
            path = Path(self.get_ext_filename(name) if self.inplace else self.get_ext_fullpath(name))
            (ROOT / path).unlink(missing_ok=True)
        super().run()

    def build_extensions(self):
        outputs = {
            ext.name.split(".")[1]: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions
        }
        for output in outputs.values():
            output.parent.mkdir(parents=True, exist_ok=True)
            output.unlink(missing_ok=True)
        if sys.platform == "win32":
            self.missed(outputs, "has not been tried on Windows: the package runs its reference")
            return
        try:
            self.compile(outputs)
        except recipe.Unavailable as why:
            self.missed({"_cuda": outputs.pop("_cuda")}, f"cannot be compiled: {why}")
            self.compile(outputs)
        self.missed(outputs, "did not compile (see above)")

    def compile(self, outputs):
        import ninja

        # not build_temp, which is another one for every editable build: ninja keeps what has not changed
        folder = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        columns = folder / "columns.h"
        # written only where it has changed, because everything is compiled anew after it
        if not columns.exists() or columns.read_text() != header():
            columns.write_text(header())
        (folder / "build.ninja").write_text(recipe.ninja_file(outputs, digest(ROOT)))
        # on after a failure: one module may have no good compiler, and the other one has
        subprocess.call([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder), "-k", "0"])

    def missed(self, outputs, why):
        """Fail for a module that is not there and was asked for, else say so."""
        for module, output in outputs.items():
            if output.exists():
                continue
            name, variable = MODULES[module]
            text = f"the {name} {why}: {variable}=0 leaves it out"
            if WANTED[module] == "1":
                raise CompileError(text)
            self.warn(text)


class CleanBuild(build):
    def run(self):
        # what an earlier build left there would become part of the wheel
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    def run_command(self, command):
        super().run_command(command)
        built = Path(self.get_finalized_command("build").build_lib)
        if command == "build" and not any(any(built.rglob(f"{module}.*")) for module in MODULES):
            # for any Python and platform
            self.distribution.ext_modules = []
            self.root_is_pure = True


setup(
    ext_modules=[
        Extension(f"fusedlr.{module}", [f"csrc/{module[1:]}/module.cpp"], optional=wanted != "1")
        for module, wanted in WANTED.items()
        if wanted != "0"
    ],
    cmdclass={"build_ext": NinjaBuild, "build": CleanBuild, "bdist_wheel": Wheel},
)
