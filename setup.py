"""Builds the compiled modules from csrc/; metadata lives in pyproject.toml, how to compile in csrc/recipe.py.

FUSEDLR_CPU=auto|0|1: the modules if they can be built (the default), never, or else fail.
CXX, CXXFLAGS and LDFLAGS are the compiler, with arguments if need be, and more flags.
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
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "csrc")]

import recipe  # noqa: E402

from fusedlr.columns import header  # noqa: E402
from fusedlr.sources import digest  # noqa: E402

# module -> what it is
MODULES = {"_host": "compiled watch", "_cpu": "C++ kernel", "_cuda": "launcher of the CUDA kernels"}
WANTED = os.environ.get("FUSEDLR_CPU") or "auto"
if WANTED not in ("auto", "0", "1"):
    sys.exit(f"FUSEDLR_CPU={WANTED!r} is unknown, expected auto, 0 or 1")


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
            text = f"the {MODULES[module]} {why}: FUSEDLR_CPU=0 leaves it out"
            if WANTED == "1":
                raise CompileError(text)
            self.warn(text)


class Sources(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            # the package finds them in the checkout
            return
        for name in recipe.KERNEL_SOURCES:
            target = Path(self.build_lib, "fusedlr", "csrc", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / "csrc" / name, target)


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
        Extension(f"fusedlr.{module}", [f"csrc/{module[1:]}/module.cpp"], optional=WANTED != "1")
        for module in MODULES
        if WANTED != "0"
    ],
    cmdclass={"build_ext": NinjaBuild, "build": CleanBuild, "build_py": Sources, "bdist_wheel": Wheel},
)
