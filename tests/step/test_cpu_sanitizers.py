"""The C++ kernel under the sanitizers of the compiler: addresses, undefined behaviour, threads."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import ROOT

from fusedlr.backends import cpu
from fusedlr.columns import header

if cpu.why_not([torch.device("cpu")]):
    pytest.skip(str(cpu.why_not([torch.device("cpu")])), allow_module_level=True)


HERE, CSRC = Path(__file__).resolve().parent, ROOT / "csrc"
COMPILER: Any = shutil.which("c++")

needs_compiler = pytest.mark.skipif(
    COMPILER is None or not CSRC.is_dir(), reason="needs the sources and a C++ compiler"
)


def objects(folder: Path, flags: str, every_isa: bool) -> list[str]:
    """The kernel and cpu_sanitized.cpp, compiled."""
    shared = (
        f"-std=c++17 -O1 -g -ffp-contract=off -fno-math-errno -fno-trapping-math -fopenmp {flags}".split()
    )
    isas = {"baseline": ""}
    if every_isa and platform.machine() == "x86_64":
        shared.append("-DFUSEDLR_X86")
        isas["avx2"] = "-mavx2 -ftree-vectorize"
        isas["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -ftree-vectorize"
    sources = [(HERE / "cpu_sanitized.cpp", ""), (CSRC / "cpu" / "step.cpp", "")]
    sources += [(CSRC / "cpu" / "kernel.cpp", f"-DFUSEDLR_ISA={isa} {more}") for isa, more in isas.items()]
    (folder / "columns.h").write_text(header())
    made = [str(folder / f"{i}.o") for i in range(len(sources))]
    builds = [
        subprocess.Popen(
            [COMPILER, *shared, f"-I{CSRC}", f"-I{folder}", *more.split(), "-c", source, "-o", to]
        )
        for (source, more), to in zip(sources, made, strict=True)
    ]
    assert [build.wait() for build in builds] == [0] * len(builds)
    return made


def run_program(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Link and run; `arguments` are the compiler's."""
    program = str(folder / "program")
    subprocess.run([COMPILER, *arguments, "-o", program], check=True)
    # what the OpenMP runtime keeps until the end is no leak
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program], capture_output=True, text=True, env=environment)


@needs_compiler
@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all"
    ran = run_program(tmp_path, *objects(tmp_path, flags, every_isa=True), "-fopenmp", *flags.split())
    assert ran.returncode == 0, ran.stderr[:3000]
    assert ran.stdout.split() == cpu.isas()


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs GCC's names for OpenMP")
def test_threads_do_not_race(tmp_path):
    made = objects(tmp_path, "-fsanitize=thread -DFEW", every_isa=False)
    # in place of libgomp, whose barriers the sanitizer does not see: it would report every one
    runtime = (str(HERE / "omp_threads.cpp"), "-pthread", "-fsanitize=thread")
    ran = run_program(tmp_path, *made, *runtime)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr[:3000]
    assert ran.stdout.split() == ["baseline"]
    ran = run_program(tmp_path, *made, *runtime, "-DNO_BARRIER")
    assert "data race" in ran.stderr and ran.returncode
