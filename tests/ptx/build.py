"""Builds what the tests of the kernels need into build/ptx, once per state of its sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "ptx"

Command = Sequence[str | Path]

COMPILER = (os.environ.get("CXX") or "g++").split()


def why_not() -> str | None:
    """Why the machine cannot be compiled here, or None."""
    if not (ROOT / "csrc").is_dir():
        # beside an installed package there is no folder to build it in
        return "needs the tree"
    return None if shutil.which(COMPILER[0]) else f"there is no C++ compiler {COMPILER[0]}"


def once(name: str, sources: Iterable[Path], make: Callable[[Path], None], of: str = "") -> Path:
    """The folder that `make` has filled for these sources, and for what `of` says of compilers.

    Those of other states are removed; other processes wait.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    state = hashlib.sha256(of.encode())
    for path in sorted(sources):
        state.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    folder = FOLDER / f"{name}-{state.hexdigest()[:16]}"
    with (FOLDER / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            for old in FOLDER.glob(f"{name}-{'?' * 16}"):
                shutil.rmtree(old)
            folder.mkdir()
            make(folder)
            (folder / "done").touch()
    return folder


def run_all(commands: Iterable[Command], folder: Path) -> None:
    """Run compilers, two at a time; what a failed one says is the message of the error."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command: run(command, folder), commands))


def run(command: Command, folder: Path, **environment: str) -> None:
    """Run one command in a folder."""
    words = list(map(str, command))
    env = {**os.environ, **environment}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stdout}{done.stderr}")


def machine() -> Path:
    """The machine as a shared library."""
    sources = HERE / "machine"
    # a fused product is rounded once, which a processor without the instruction takes a library for
    fused = " fma " in Path("/proc/cpuinfo").read_text()
    flags = "-std=c++17 -O3 -ffp-contract=off -fPIC -fvisibility=hidden -Wall" + " -mfma" * fused

    def make(folder: Path) -> None:
        names = ("machine", "parse")
        command = [*COMPILER, *flags.split()]
        run_all(([*command, "-c", sources / f"{name}.cpp", "-o", f"{name}.o"] for name in names), folder)
        run([*command, "-shared", *(f"{name}.o" for name in names), "-o", "libmachine.so"], folder)

    return once("machine", sources.iterdir(), make, of=flags) / "libmachine.so"
