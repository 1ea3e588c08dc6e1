"""What setup.py makes of an environment: which modules, which flags, which wheel."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from kit import ROOT

from fusedlr.sources import digest

if not (ROOT / "setup.py").is_file():
    pytest.skip("needs the tree", allow_module_level=True)
pytest.importorskip("pybind11")
pytest.importorskip("ninja")
if sys.platform == "win32":
    pytest.skip("the compiler here is a shell script", allow_module_level=True)

# notes how it was called, and writes what it was asked for; one of its kind knows no OpenMP
COMPILER = """#!/bin/sh
echo "$0 $*" >>'{log}'
case "$*" in *{refused}*) echo "no {refused}" >&2; exit 1 ;; esac
while [ $# -gt 1 ]; do
    case "$1" in -o) echo >"$2" ;; -MF) echo out: >"$2" ;; esac
    shift
done
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is built from, in a folder whose name is awkward for shells and for ninja."""
    tree = tmp_path / "a tree: $HOME's"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in ("fusedlr", "csrc", "bench"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.fixture
def compiler(tmp_path: Path):
    """Make a compiler that refuses an argument; returns its path, quoted for CXX, and its log."""

    def make(refused: str = "nothing") -> tuple[str, Path]:
        path, log = tmp_path / "no compiler" / "c++", tmp_path / "log"
        path.parent.mkdir(exist_ok=True)
        path.write_text(COMPILER.format(log=log, refused=refused))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return f"'{path}'", log

    return make


def setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("CXXFLAGS", "LDFLAGS")}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=tree,
        env={**clean, "FUSEDLR_CPU": "auto", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wheel(tree: Path, **environment: str) -> tuple[str, list[str]]:
    """Name and contents of the wheel that is built from `tree`."""
    built = setup(tree, "-q", "bdist_wheel", **environment)
    assert built.returncode == 0, built.stdout
    (path,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return path.name, archive.namelist()


def test_a_wheel_without_the_module_is_for_every_platform(tree):
    name, files = wheel(tree, FUSEDLR_CPU="0")
    assert name.endswith("-py3-none-any.whl")
    assert "fusedlr/optimizer.py" in files and not [file for file in files if "_cpu" in file]


def test_without_a_compiler_the_package_is_built_and_what_was_built_before_is_not_in_it(tree):
    for folder in (tree / built_lib(tree) / "fusedlr", tree / "build" / "lib" / "fusedlr"):
        folder.mkdir(parents=True)
        (folder / "_cpu.so").write_text("of an earlier build")
        (folder / "planted.py").write_text("of an earlier build")
    name, files = wheel(tree, CXX="/nonexistent/c++")
    assert name.endswith("-py3-none-any.whl")
    assert "fusedlr/optimizer.py" in files
    assert not [file for file in files if "planted" in file or "_cpu" in file]


def built_lib(tree: Path) -> str:
    """Where setuptools puts together what goes into a wheel for this Python and platform."""
    code = """
from setuptools import Distribution, Extension
build = Distribution({"ext_modules": [Extension("a", [])]}).get_command_obj("build")
build.ensure_finalized()
print(build.build_lib)
"""
    return subprocess.check_output([sys.executable, "-c", code], cwd=tree, text=True).strip()


def test_the_compiler_may_have_arguments_and_paths_may_have_blanks(tree, compiler):
    cxx, log = compiler()
    name, files = wheel(
        tree, CXX=f"env A=1 {cxx} --first", CXXFLAGS="-DX='$Y'", LDFLAGS="-Wl,-rpath,'$ORIGIN'"
    )
    assert "none-any" not in name and [file for file in files if re.fullmatch(r"fusedlr/_cpu\..*so", file)]
    calls = log.read_text().splitlines()
    assert all(" --first " in call for call in calls)
    assert all("-DX=$Y" in call for call in calls if " -c " in call)
    links = {re.search(r"/fusedlr/(_\w+)\.", call)[1]: call for call in calls if " -shared " in call}
    assert links.keys() == {"_cpu", "_cuda", "_host"} and "-fopenmp" in links["_cpu"]
    assert all("-Wl,-rpath,$ORIGIN" in call for call in links.values())
    assert not [call for call in calls if "-march=native" in call or "fast-math" in call]


def test_a_compiler_without_openmp_is_asked_for_one_thread(tree, compiler):
    cxx, log = compiler(refused="-fopenmp")
    _, files = wheel(tree, CXX=cxx)
    assert [file for file in files if "_cpu" in file]
    asked, *calls = log.read_text().splitlines()
    assert "-fopenmp" in asked and not [call for call in calls if "-fopenmp" in call]


def test_a_compiler_that_fails_is_an_error_only_if_the_module_was_asked_for(tree, compiler):
    cxx, _ = compiler(refused="cpu/kernel")
    failed = setup(tree, "-q", "bdist_wheel", CXX=cxx, FUSEDLR_CPU="1")
    assert failed.returncode and "the C++ kernel did not compile" in failed.stdout
    _, files = wheel(tree, CXX=cxx)
    # the watch does not need the kernel
    assert not [file for file in files if "_cpu" in file] and [file for file in files if "_host" in file]


def test_an_unknown_setting_is_named(tree):
    refused = setup(tree, "--version", FUSEDLR_CPU="yes")
    assert refused.returncode and "FUSEDLR_CPU='yes' is unknown, expected auto, 0 or 1" in refused.stdout


def test_the_source_of_the_cuda_kernels_travels_in_every_wheel(tree, compiler):
    cxx, _ = compiler()
    for environment in ({"FUSEDLR_CPU": "0"}, {"CXX": cxx}):
        _, files = wheel(tree, **environment)
        shutil.rmtree(tree / "dist")
        inside = {file.removeprefix("fusedlr/csrc/") for file in files if file.startswith("fusedlr/csrc/")}
        assert inside == {"schedule.h", "adamw.h", "guard.h", "types.h", "cuda/step.h", "cuda/step.cu"}


def test_a_failed_build_in_place_leaves_no_module(tree, compiler):
    cxx, log = compiler()
    assert setup(tree, "-q", "build_ext", "--inplace", CXX=cxx).returncode == 0
    (module,) = (tree / "fusedlr").glob("_cpu*.so")
    # a wheel is none of its business, and it none of the wheel's
    _, files = wheel(tree, FUSEDLR_CPU="0")
    assert not [file for file in files if "_cpu" in file]
    setup(tree, "-q", "bdist_wheel", CXX="/nonexistent/c++")
    assert module.exists()
    setup(tree, "-q", "build_ext", "--inplace", CXX="/nonexistent/c++")
    assert not module.exists()
    assert log.exists()


def test_the_sources_compiled_in_are_those_of_the_tree(tree, compiler):
    cxx, log = compiler()
    setup(tree, "-q", "build_ext", "--inplace", CXX=cxx)
    assert f"-DFUSEDLR_SOURCES={digest(tree)} " in log.read_text()
    before = digest(tree)
    (tree / "csrc" / "schedule.h").open("a").write("\n")
    assert digest(tree) != before
    setup(tree, "-q", "build_ext", "--inplace", CXX=cxx)
    assert f"-DFUSEDLR_SOURCES={digest(tree)} " in log.read_text()
    # a folder of that name beside an installed package is somebody else's
    (tree / "csrc" / "cpu" / "module.cpp").unlink()
    assert digest(tree) == digest(tree / "nothing") == ""


def test_a_module_older_than_its_sources_is_not_used(tree):
    for module in ROOT.glob("fusedlr/_*.so"):
        shutil.copy(module, tree / "fusedlr")
    why = "import fusedlr.backends.cpu as cpu; print(cpu.why_not([]))"

    def ask() -> str:
        return subprocess.check_output([sys.executable, "-c", why], cwd=tree, text=True).strip()

    if ask() != "None":
        pytest.skip("needs the module of these sources")
    (tree / "csrc" / "schedule.h").open("a").write("\n")
    assert ask().startswith("its sources have changed since it was built: install fusedlr again")
    for module in tree.glob("fusedlr/_cpu*.so"):
        module.write_bytes(b"")
    assert ask().startswith("the C++ kernel does not load (")
