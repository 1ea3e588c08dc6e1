"""The CUDA kernels compiled for the host: `fusedlr._cuda` without a GPU, for tensors on the CPU.

Built once per state of the sources into build/, where a C++ compiler and the sources are to be had.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from fusedlr import backends, compiled
from fusedlr.sources import digest

ROOT = Path(__file__).resolve().parents[1]
TESTS, CSRC = ROOT / "tests", ROOT / "csrc"
# as setup.py has nvcc do it: products are rounded
_FLAGS = "-std=c++17 -O1 -fPIC -ffp-contract=off -fvisibility=hidden -Wall -Wno-unknown-pragmas"
# contexts are switched by longjmp, which a hardened libc refuses
_FLAGS += " -U_FORTIFY_SOURCE"
# csrc/cuda.cu, or what includes it
_KERNELS = ["-x", "c++", "-include", "cuda_on_host.h"]
_COMPILER = os.environ.get("CXX") or "c++"


@cache
def recipe() -> ModuleType:
    """csrc/recipe.py, which setup.py imports before there is a package."""
    sys.path.append(str(CSRC))
    return import_module("recipe")


def build(folder: Path, kernels: Path = CSRC / "cuda.cu", more: str = "", rest: Path | None = None) -> Path:
    """Compile the module into `folder`, with `kernels` in place of csrc/cuda.cu; returns its path.

    `rest`: the folder of another build, to take all from but the kernels of fp32 parameters.
    """
    import pybind11

    folder.mkdir(parents=True, exist_ok=True)
    includes = [CSRC, TESTS, pybind11.get_include(), sysconfig.get_path("include")]
    flags = [*_FLAGS.split(), *more.split(), *(f"-I{path}" for path in includes)]
    defined = {"archs": '-DFUSEDLR_ARCHS=""', "sources": f"-DFUSEDLR_SOURCES={digest(CSRC)}"}
    objects = {
        f"{name}.o": [*_KERNELS, f"-DFUSEDLR_TYPE={type_}", f"-DFUSEDLR_NAME={name}", str(kernels)]
        for name, type_ in recipe().CUDA_TYPES.items()
    }
    objects["on_host.o"] = [str(TESTS / "cuda_on_host.cpp")]
    objects["module.o"] = [defined["archs"], str(CSRC / "cuda_module.cpp")]
    objects["sources.o"] = [defined["sources"], str(CSRC / "sources.cpp")]

    linked = [name if rest is None or name == "f32.o" else str(rest / name) for name in objects]
    made = {name: source for name, source in objects.items() if name in linked}

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda item: _run([*flags, "-c", *item[1], "-o", item[0]], folder), made.items()))
    path = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    # in one move: another process may be looking for it
    _run(["-shared", *more.split(), *linked, "-o", f"{path}.new"], folder)
    os.replace(f"{path}.new", path)
    return path


def library(folder: Path, source: Path, more: list[str]) -> Path:
    """A library of one file that includes the kernels, for ctypes."""
    files = [*_KERNELS, str(source), "-x", "none", str(TESTS / "cuda_on_host.cpp")]
    path = folder / "library.so"
    _run([*_FLAGS.split(), f"-I{CSRC}", f"-I{TESTS}", *more, "-shared", *files, "-o", str(path)], folder)
    return path


def _run(arguments: list[str], folder: Path) -> None:
    command = [*shlex.split(_COMPILER), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def load(path: Path) -> ModuleType:
    """The module at `path`."""
    # by a name of its own: pybind11 keeps modules by name, and would return the first
    spec = importlib.util.spec_from_file_location(f"{path.parent}._cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def why_not() -> str | None:
    """Why the module cannot be built here."""
    if not CSRC.is_dir():
        return "needs the tree"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    if shutil.which(shlex.split(_COMPILER)[0]) is None:
        return f"there is no compiler {_COMPILER!r}"
    return None


def installed() -> Path:
    """The module of this state of the sources, built if it is not there."""
    state = digest(CSRC, TESTS / "cuda_on_host.cpp", TESTS / "cuda_on_host.h")
    folder = ROOT / "build" / "cuda-on-host" / state[:16]
    path = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # those of other states; what another process is building has a longer name
        for old in folder.parent.glob("?" * 16):
            shutil.rmtree(old, ignore_errors=True)
        building = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
        build(building)
        try:
            building.rename(folder)
        except OSError:
            # another process was faster
            shutil.rmtree(building)
    return path


def install() -> None:
    """Let the backend `cuda` run on the CPU in this process, if it can be built."""
    if why_not() is None:
        use(load(installed()))


def use(module: Any) -> None:
    """Make `module` the one that is called, by those who ask for it by name."""
    compiled.cuda, compiled.cuda_error = module, None
    backends.BACKENDS["cuda"] = backends.BACKENDS.pop("cuda")


def functions() -> ctypes.CDLL:
    """What cuda_on_host.cpp lets tests call in the module in use."""
    return ctypes.CDLL(compiled.cuda.__file__)
