"""Everything that needs a GPU, in one command: `python -m bench.gpu_suite --out DIR`.

Runs the tests marked `gpu`, then looks for host syncs in every GPU backend's step. Writes `gpu_suite.json`
after each section, so that what was found is kept if the run is stopped. On a machine without a GPU it runs
the same code in reduced form on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fusedlr
from fusedlr import backends

from . import syncs
from .environment import ROOT, environment

# a few shapes of a LoRA adapter; syncs depend on how many there are, not on their size
_SHAPES = [(16, 256), (256, 16), (16, 256), (1024, 16)] * 2


def main(argv: list[str] | None = None) -> int:
    """Run the suite; 0 if everything passed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench/results/gpu"),
        help="folder for the results (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="cpu runs a reduced form (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=100, help="steps watched for syncs (default: %(default)s)"
    )
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps {args.steps} must be at least 1")
    available = torch.cuda.is_available()
    if args.device == "cuda" and not available:
        parser.error("--device cuda: torch sees no CUDA device here")
    device = "cuda" if args.device != "cpu" and available else "cpu"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")

    sections: list[tuple[str, Callable[[], dict[str, Any]]]] = [("environment", environment)]
    if not args.no_tests:
        sections.append(("tests", lambda: run_tests(device, args.out)))
    # on the CPU a step's events are the same every time, and the profiler is slow
    steps = args.steps if device == "cuda" else min(args.steps, 3)
    # the C++ kernel never sees a GPU, and may read a number that lies in the host's memory
    for name in (name for name in runnable(device) if name != "cpu"):
        sections.append((f"syncs {name}", lambda name=name: look_for_syncs(name, device, steps)))
    return run_sections(sections, device, args.out / "gpu_suite.json")


def runnable(device: str) -> list[str]:
    """Backends that can run on the device."""
    return [name for name, why in backends.reasons([torch.device(device)]).items() if why is None]


def run_sections(sections: list[tuple[str, Callable[[], dict[str, Any]]]], device: str, path: Path) -> int:
    """Run one section after the other and write what there is after each."""
    results: dict[str, Any] = {"device": device}
    failed = []
    for i, (name, section) in enumerate(sections, 1):
        print(f"[{i}/{len(sections)}] {name}", flush=True)
        start = time.perf_counter()
        try:
            results[name] = section()
        except Exception as error:  # a broken section must not take the others' results with it
            results[name] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        seconds = results[name]["seconds"] = round(time.perf_counter() - start, 2)
        passed = results[name].get("passed", True)
        failed += [] if passed else [name]
        print(f"    {'passed' if passed else 'FAILED'} in {seconds} s: {_short(results[name])}", flush=True)
        results["failed"] = failed
        # a rename, so that a reader never sees half a file
        part = path.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        part.replace(path)
    print(f"results: {path}")
    return 1 if failed else 0


def _short(result: dict[str, Any]) -> str:
    line = ", ".join(f"{key}={value}" for key, value in result.items() if key not in ("seconds", "passed"))
    return line if len(line) <= 160 else line[:157] + "..."


def run_tests(device: str, out: Path) -> dict[str, Any]:
    """The tests marked `gpu`; on the CPU a few of their CPU twins."""
    report = out / "tests.xml"
    select = (
        ["-m", "gpu"] if device == "cuda" else ["-m", "not slow", "-k", "test_fp64_equals_torch and edges"]
    )
    command = [sys.executable, "-m", "pytest", "-q", "tests", *select, f"--junitxml={report}"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    ran = counts["tests"] - counts["skipped"]
    return {"passed": run.returncode == 0 and ran > 0, **counts}


def look_for_syncs(backend: str, device: str, steps: int) -> dict[str, Any]:
    """Both sync checks on a step with schedule, clipping and a scaler's flags."""
    optimizer = make_optimizer(backend, device)
    # the first step allocates state and compiles
    optimizer.step()
    on_gpu = device == "cuda"
    reported = syncs.debug_mode_error(optimizer.step, steps) if on_gpu else None
    counts = syncs.trace(optimizer.step, steps, ("CPU", "CUDA") if on_gpu else ("CPU",))
    found = syncs.forbidden(counts.elements())
    launches = sum(n for name, n in counts.items() if "LaunchKernel" in name)
    return {
        "passed": reported is None and not found,
        "debug mode": reported,
        "forbidden events": dict(found),
        "launches per step": launches / steps,
    }


def make_optimizer(backend: str, device: str) -> fusedlr.FusedAdamW:
    """An optimizer over LoRA-like tensors with gradients, and the attributes that a GradScaler sets."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in _SHAPES]
    optimizer = fusedlr.FusedAdamW(
        [{"params": params[::2]}, {"params": params[1::2], "lr": 1e-3}],
        lr=1e-4,
        schedule=fusedlr.cosine(warmup_steps=10, total_steps=200),
        max_grad_norm=1.0,
        backend=backend,
    )
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(device)
    optimizer.grad_scale = torch.tensor(1.0, device=device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(0.0, device=device)  # type: ignore[attr-defined]
    return optimizer


if __name__ == "__main__":
    sys.exit(main())
