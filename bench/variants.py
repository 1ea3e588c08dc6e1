"""The GPU kernels with other numbers in them, gated and timed: choices that only a GPU can make.

A variant is a copy of the package with some of its text replaced, in a process of its own: the numbers are
spread over tables, headers and compiled kernels. Where there is no GPU, Triton's variants pass the gate in
its interpreter, and CUDA's are compiled. `python -m bench.variants --device cpu --backend triton` is one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from . import graphs, parity
from . import step as step_bench
from .environment import ROOT
from .providers import BASELINE, PROVIDERS
from .shapes import INVENTORIES, Inventory, even

_CUDA, _TRITON = "csrc/cuda/step.cu", "fusedlr/backends/gpu/triton_kernels.py"
_CHUNK = "fusedlr/columns.py", "CHUNK = 4096"
# two chunks each, of which the second ends in the middle of a tile
_SMALL = even(2, 9000)
# 448 tensors of 40 M parameters
_LARGE = INVENTORIES["llama-2-7b-all-r16"]
_SECONDS = 0.5
_REPLAYS = 50
# what is compiled where nothing can be launched
_ARCH = "sm_90"


@dataclass(frozen=True)
class Variant:
    """Kernels of a backend with other numbers: of every edit the file, its text, and what replaces that."""

    name: str
    backend: str
    edits: tuple[tuple[str, str, str], ...] = ()


def _cuda(name: str, *edits: tuple[str, str, str]) -> Variant:
    return Variant(f"cuda, {name}", "cuda", edits)


def _triton(name: str, *edits: tuple[str, str, str]) -> Variant:
    return Variant(f"triton, {name}", "triton", edits)


def _chunk(elements: int) -> tuple[str, str, str]:
    return (*_CHUNK, f"CHUNK = {elements}")


def _tile(elements: int) -> tuple[str, str, str]:
    return _TRITON, "WIDE = tl.constexpr(1024)", f"WIDE = tl.constexpr({elements})"


_STEP_BLOCKS = "constexpr int kStepBlocks = sizeof(M) == 4 ? 4 : 3;"
_NORM_BLOCKS = "constexpr int kNormBlocks = sizeof(P) == 4 ? 6 : 8;"
_NORM_BLOCKS_4 = (_CUDA, _NORM_BLOCKS, "constexpr int kNormBlocks = 4;")
_EACH = "4 if tl.float32 == MOMENTS or (MASTER and tl.float16 == PARAMS) else 8"

# the first of a backend has the kernels as they are; the last repeats it, and shows how much chance there is
VARIANTS = (
    _cuda("as it is"),
    _cuda("chunks of 2048", _chunk(2048)),
    _cuda("chunks of 8192", _chunk(8192), _NORM_BLOCKS_4),
    _cuda("2 blocks per processor", (_CUDA, _STEP_BLOCKS, "constexpr int kStepBlocks = 2;")),
    _cuda("4 norm blocks per processor", _NORM_BLOCKS_4),
    _cuda("4 partial sums at once", (_CUDA, "kSlotsAtOnce = 16;", "kSlotsAtOnce = 4;")),
    _cuda("1 row counted at once", (_CUDA, "kRowsAtOnce = 2;", "kRowsAtOnce = 1;")),
    _cuda("as it is, again"),
    _triton("as it is"),
    _triton("chunks of 8192", _chunk(8192)),
    _triton("tiles of 512", _tile(512)),
    _triton("tiles of 2048, 256 threads", _tile(2048), (_TRITON, "THREADS = 128", "THREADS = 256")),
    _triton("64 threads", (_TRITON, "THREADS = 128", "THREADS = 64")),
    _triton("8 elements together", (_TRITON, _EACH, "8")),
    _triton("as it is, again"),
)
# those that are tried where there is no GPU
REDUCED = ("cuda, chunks of 8192", "triton, tiles of 512")


def plant(variant: Variant, folder: Path) -> None:
    """Put what runs a variant into an empty folder.

    Raises:
        ValueError: a text that an edit replaces is not in its file exactly once.
    """
    for name in ("fusedlr", "csrc", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name, old, new in variant.edits:
        path = folder / name
        text = path.read_text()
        if text.count(old) != 1:
            raise ValueError(f"{variant.name}: {name} has {old!r} {text.count(old)} times instead of once")
        path.write_text(text.replace(old, new))


def run(variant: Variant, device: str) -> dict[str, Any]:
    """What `measure` says of a variant, in a process of its own; `error` if that fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(variant, folder)
        result = folder / "result.json"
        command = [sys.executable, "-m", "bench.variants", "--backend", variant.backend]
        command += ["--device", device, "--result", str(result)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([name, os.environ.get("PYTHONPATH", "")])}
        if device == "cpu":
            env["TRITON_INTERPRET"] = "1"
        made = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if made.returncode:
            return {"error": (made.stderr.splitlines() or [f"exit code {made.returncode}"])[-1]}
        return json.loads(result.read_text())


def measure(backend: str, device: torch.device) -> dict[str, Any]:
    """The kernels of a backend in this process: gated and timed on a GPU, by type of the parameters."""
    if device.type == "cuda":
        return {name: timed(f"fusedlr-{backend}", _LARGE, device, name) for name in step_bench.DTYPES}
    provider = PROVIDERS[f"fusedlr-{backend}"]
    if provider.why_not(device) is not None and backend == "cuda":
        return {"compiled": _compiled()}
    found = {}
    for name, dtype in step_bench.DTYPES.items():
        begin = parity.start(_SMALL, dtype, device)
        away = parity.gate(provider.build(begin.parameters(), True), begin, parity.oracle(begin, True))
        allowed = parity.bound(_SMALL, dtype)
        if not away <= allowed:
            raise RuntimeError(f"{name}: {parity.misfit(away, allowed)}")
        found[name] = {"distance": away}
    return found


def timed(name: str, inventory: Inventory, device: torch.device, dtype: str) -> dict[str, Any]:
    """Times of a provider's step with clipping, and of a replay of it, in milliseconds.

    Raises:
        RuntimeError: it does not pass the gate.
    """
    timing = step_bench.Timing(device, dtype, seconds=_SECONDS)
    found = step_bench.run(inventory, [PROVIDERS[BASELINE], PROVIDERS[name]], timing)
    row = next((row for row in found.rows if row.provider == name), None)
    if row is None:
        raise RuntimeError(f"{dtype}: {found.rejected}")
    begin = parity.start(inventory, step_bench.DTYPES[dtype], device)
    stepper = PROVIDERS[name].build(begin.parameters(), True)
    parity.advance(stepper, begin)
    replay = graphs.replay_ms(stepper.step, device, _REPLAYS)
    bandwidth = found.bandwidth_gb_per_s.median
    return {
        "step ms": row.ms.median,
        "replay ms": replay,
        "bandwidth GB/s": bandwidth,
        "share of bandwidth": row.bytes_per_parameter * found.parameters / replay / 1e6 / bandwidth,
        "distance": row.distance,
    }


def _compiled() -> dict[str, Any]:
    """Registers, and bytes that are spilled, of what a step in fp32 takes."""
    # here, because it is the variant's own
    kernels, nvrtc = (import_module(f"fusedlr.backends.gpu.{name}") for name in ("kernels", "nvrtc"))
    libraries = nvrtc.found()
    if not libraries:
        return {"left out": "there is no NVRTC"}
    text, headers = kernels.sources()
    names = {
        "norm": kernels.name_of_norm("f32", "few"),
        "step": kernels.name_of_step("f32", "f32", False, "few"),
    }
    options = (*kernels.OPTIONS, "--ptxas-options=-v")
    made = libraries[0].compile(text, _ARCH, list(names.values()), headers, options)
    found = {}
    for of in re.split(r"Compiling entry function ", made.log)[1:]:
        kind = "norm" if "norm_kernel" in of.splitlines()[0] else "step"
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", of)))
        found[kind] = {"registers": int(re.findall(r"Used (\d+) registers", of)[0]), "spilled": spilled}
    return {"for": _ARCH, **found}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.variants", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--backend", choices=("cuda", "triton"), required=True, help="whose kernels")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    parser.add_argument("--result", type=Path, help="file for the result (default: it is printed)")
    args = parser.parse_args(argv)
    text = json.dumps(measure(args.backend, torch.device(args.device)))
    if args.result is None:
        print(text)
    else:
        args.result.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
