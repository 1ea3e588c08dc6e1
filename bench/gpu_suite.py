"""Everything that needs a GPU, in one command: `python -m bench.gpu_suite --out DIR`.

Runs the sections of bench/gpu_sections.py one after the other, on a GPU each in a process of its own with a
time limit: a kernel that hangs or spoils the device's memory costs its own section alone. Writes
`gpu_suite.json` and `gpu_suite.md` after each, so that what was found is kept if the run is stopped. On a
machine without a GPU it runs the same code in reduced form on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .environment import ROOT
from .gpu_report import markdown, short
from .gpu_sections import SECTIONS, Settings, look_for_syncs

__all__ = ["look_for_syncs", "main", "run_isolated", "run_sections"]

# a machine with a GPU is often lent for ten minutes
_MINUTES = 9.0
# a section that is given less would only be stopped
_LEAST_SECONDS = 5.0


def main(argv: list[str] | None = None) -> int:
    """Run the suite; 0 if everything passed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_suite", description=__doc__.split("\n")[0], allow_abbrev=False
    )
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
        "--sections", help=f"which, with commas, in this order: {', '.join(SECTIONS)} (default: all)"
    )
    parser.add_argument(
        "--minutes", type=float, default=_MINUTES, help="for all sections on a GPU (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=100, help="steps watched for syncs (default: %(default)s)"
    )
    # how the suite calls itself: one section, its result into a file
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps {args.steps} must be at least 1")
    if not 0 < args.minutes < 1e4:
        parser.error(f"--minutes {args.minutes} must be above 0")
    names = [name.strip() for name in args.sections.split(",")] if args.sections else list(SECTIONS)
    for name in names:
        if name not in SECTIONS:
            parser.error(f"--sections: {name!r} is none of {', '.join(SECTIONS)}")
    available = torch.cuda.is_available()
    if args.device == "cuda" and not available:
        parser.error("--device cuda: torch sees no CUDA device here")
    device = "cuda" if args.device != "cpu" and available else "cpu"
    out = args.out.absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")

    settings = Settings(device, out, args.steps)
    if args.result is not None:
        write(args.result, run_section(names[0], replace(settings, keep=partial(write, args.result))))
        return 0
    if device == "cpu":
        print("no GPU in use: a reduced form, on the CPU, which measures nothing of interest")
    else:
        # whoever ends the suite ends its section too, which runs in a process group of its own
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    end = time.monotonic() + 60 * args.minutes
    run = partial(run_isolated, settings=settings, end=end) if device == "cuda" else None
    return run_sections(
        [(name, partial(run or partial(run_section, settings=settings), name)) for name in names],
        device,
        out / "gpu_suite.json",
    )


def run_section(name: str, settings: Settings) -> dict[str, Any]:
    """The result of a section, made in this process."""
    try:
        return SECTIONS[name].run(settings)
    except Exception as error:  # a broken section must not take the others' results with it
        return {"passed": False, "error": f"{type(error).__name__}: {error}"}


def run_isolated(name: str, settings: Settings, end: float, seconds: float | None = None) -> dict[str, Any]:
    """The result of a section, made in a process that is killed at its limit or at the suite's `end`."""
    limit = min(seconds or SECTIONS[name].seconds, end - time.monotonic())
    if limit < _LEAST_SECONDS:
        return {"passed": False, "error": "no time left for it"}
    path = settings.out / "section.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.gpu_suite", "--sections", name, "--result", str(path)]
    command += ["--device", settings.device, "--out", str(settings.out), "--steps", str(settings.steps)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    # one GPU: the Trainer would spread its run over all
    env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        code: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        # the tests that it started too
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    path.unlink(missing_ok=True)
    if code is None:
        return {**result, "passed": False, "error": f"stopped after {limit:.0f} s"}
    if code:
        return {**result, "passed": False, "error": f"ended with code {code}"}
    return result


def run_sections(sections: list[tuple[str, Callable[[], dict[str, Any]]]], device: str, path: Path) -> int:
    """Run one section after the other and write what there is after each."""
    results: dict[str, Any] = {"device": device}
    failed = []
    for i, (name, section) in enumerate(sections, 1):
        print(f"[{i}/{len(sections)}] {name}", flush=True)
        start = time.perf_counter()
        try:
            results[name] = section()
        except Exception as error:
            results[name] = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        seconds = results[name]["seconds"] = round(time.perf_counter() - start, 2)
        passed = results[name].get("passed", True)
        failed += [] if passed else [name]
        word = "FAILED" if not passed else "left out" if "left out" in results[name] else "passed"
        print(f"    {word} in {seconds} s: {short(results[name])}", flush=True)
        results["failed"] = failed
        write(path, results)
        path.with_suffix(".md").write_text(markdown(results))
    print(f"results: {path} and {path.with_suffix('.md').name}")
    return 1 if failed else 0


def write(path: Path, result: dict[str, Any]) -> None:
    """Write plain data, and never half of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1, default=str) + "\n")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
