"""Run the PTX of the GPU kernels on the CPU, and look for races, wild accesses and wrong numbers: `make ptx`.

README.md in this folder says how. The exit status is 0 only if nothing was found and every planted fault was;
the last line has the figures.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from . import build

PARTS = ("cases", "schedules", "stale", "faults")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make ptx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", default="cuda,triton", help="which kernels (default: %(default)s)")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="what to do with them (default: %(default)s)"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases and faults whose names contain this"
    )
    parser.add_argument(
        "--triton",
        type=Path,
        metavar="DIR",
        help="another Triton, in a folder as `pip install --target DIR` makes it",
    )
    parser.add_argument(
        "--nvrtc",
        type=int,
        metavar="MAJOR",
        help="the NVRTC of this version of CUDA, 12 or 13 (default: the newest that is installed)",
    )
    args = parser.parse_args()
    backends, parts = args.backends.split(","), args.parts.split(",")
    # one thread each: the tensors are small
    os.environ |= {"OMP_NUM_THREADS": "1"}
    from . import checks, driver

    for what, known in ((backends, driver.BACKENDS), (parts, PARTS)):
        for name in what:
            if name not in known:
                parser.error(f"{name!r} is none of {', '.join(known)}")
    begun = time.perf_counter()
    missing = {name: why for name, why in driver.why_not().items() if name in backends and why is not None}
    for name, why in missing.items():
        print(f"ptx: the kernels of {name} are left out: {why}")
    present = [name for name in backends if name not in missing]
    if not present:
        print("ptx: BROKEN: there is nothing to run")
        return 2
    print(f"ptx: building into {build.FOLDER}, which takes a minute the first time", flush=True)
    driver.compile_all(tuple(present), args.triton, args.nvrtc)
    print(f"ptx: built after {time.perf_counter() - begun:.0f} s", flush=True)
    # each backend in a process of its own, as the machine is one per process
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(present), context) as pool:
        running = [
            pool.submit(checks.run, name, parts, args.only, args.triton, args.nvrtc) for name in present
        ]
        found = [future.result() for future in running]
    return report(found, begun)


def report(found: list[Any], begun: float) -> int:
    """Print what was found, the figures last; returns the exit status."""
    faults = [line for one in found for line in (*one.mismatches, *one.reports, *one.missed)]
    for one in found:
        for line in one.mismatches:
            print(f"MISMATCH {line}")
        for line in one.reports:
            print(f"FOUND {line}")
        for line in one.missed:
            print(f"NOT CAUGHT: a planted fault, {line}")
        for why, count in one.harmless.items():
            print(f"ptx: harmless, reported {count} times: {why}")
        for note in one.notes:
            print(f"ptx: {note}")

    def total(kind: str) -> int:
        return sum(one.count(kind) for one in found)

    kinds = ("race", "out of bounds", "misaligned", "undefined")
    other = sum(len(one.reports) for one in found) - sum(map(total, kinds))
    planted, missed = sum(one.planted for one in found), sum(len(one.missed) for one in found)
    figures = [
        f"cases {sum(one.cases for one in found)}",
        f"mismatches {sum(len(one.mismatches) for one in found)}",
        *(f"{name} {total(kind)}" for name, kind in zip(("races", *kinds[1:]), kinds, strict=True)),
        f"other {other}",
        f"planted faults caught {planted - missed} of {planted}",
        f"{time.perf_counter() - begun:.0f} s",
    ]
    print(f"ptx: {'FAILED' if faults else 'OK'}: {', '.join(figures)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
