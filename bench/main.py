"""One run of the benchmark from the options to the report: what is measured in which process and order."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusedlr.cli import ROOT

from .options import Settings, resolve

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class ChildError(Exception):
    """A measuring process ended without results."""


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the benchmark and return its exit code: 0, 1 where a provider failed the gate, 130 after Ctrl-C.

    Options that make no sense end in `parser.error`: one line and exit code 2.
    """
    try:
        settings = resolve(args, parser)
        runs = [_elsewhere(settings, policy) for policy in settings.policies] or [_here(settings)]
        _report(runs, settings)
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ChildError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    parts = [part for run in runs for part in (run["inventories"], *run["sweeps"].values())]
    results = [result for part in parts for result in part]
    results += [run["host"] for run in runs if run["host"] is not None]
    return 1 if any(result["rejected"] for result in results) else 0


def _elsewhere(settings: Settings, policy: str | None) -> dict[str, Any]:
    """The run of a process of its own, with another `OMP_WAIT_POLICY`, or with none."""
    shown = f"OMP_WAIT_POLICY={policy or 'unset'}"
    print(shown, file=sys.stderr)
    variables = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if policy is not None:
        variables["OMP_WAIT_POLICY"] = policy
    child = subprocess.run(
        [sys.executable, "-m", "fusedlr", "bench", *settings.arguments()],
        env=variables,
        # `-m` looks there first, so that it finds this fusedlr and no other
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    if child.returncode not in (0, 1) or not child.stdout:
        raise ChildError(f"the run with {shown} ended with exit code {child.returncode}")
    return json.loads(child.stdout)[0]


def _here(settings: Settings) -> dict[str, Any]:
    """Measure in this process; the run as plain data."""
    import torch

    from . import host, step
    from .environment import environment
    from .providers import BASELINE, PROVIDERS, available, chosen_backend
    from .results import SCHEMA
    from .shapes import sweeps

    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    timing = step.Timing(device, settings.dtype, settings.clip, settings.rounds, settings.seconds)
    providers = [PROVIDERS[name] for name in settings.providers]
    # a curve each for all would be unreadable, and take as many times as long
    few = providers if settings.chosen else [PROVIDERS[BASELINE], PROVIDERS[chosen_backend(device)]]
    jobs = [("", inventory, providers) for inventory in settings.inventories]
    if settings.sweep:
        jobs += [(name, inventory, few) for name, points in sweeps().items() for inventory in points]
    measured: dict[str, list[dict[str, Any]]] = {"": [], **{name: [] for name, _, _ in jobs}}
    skipped = {}
    driven = None
    with _progress(len(jobs) + settings.host) as note:
        for name, inventory, who in jobs:
            need, free = step.needed_bytes(inventory, len(who), settings.dtype), free_memory(device)
            if need > free:
                skipped[inventory.name] = f"needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            else:
                result = step.run(
                    inventory, who, timing, lambda text, at=inventory: note(f"{at.name}: {text}")
                )
                measured[name].append(asdict(result))
            note(None)
        if settings.host:
            found = host.run(
                device, settings.rounds, settings.seconds, note=lambda text: note(f"host: {text}")
            )
            driven = asdict(found)
            note(None)
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "device": settings.device,
        "backend": chosen_backend(device),
        "inventories": measured.pop(""),
        "sweeps": measured,
        "host": driven,
        "skipped": skipped,
        "not here": {name: why for name, why in available(device).items() if why is not None},
    }


def free_memory(device: Any) -> int:
    """Bytes that can still be allocated on the device."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        # not Linux: nobody to ask
        return sys.maxsize


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """Gives `note`: text for the bar, or None when an inventory is done. Without tqdm there is no bar."""
    try:
        from fusedlr.demo.progress import bar

        shown = bar(total=total, label="inventories", keep=False)
    except ImportError:
        yield lambda text: None
        return

    def note(text: str | None) -> None:
        shown.update(text is None)
        if text is not None:
            shown.set_postfix_str(text, refresh=False)
            # draws only as often as the bar allows
            shown.update(0)

    with shown:
        yield note


def _report(runs: list[dict[str, Any]], settings: Settings) -> None:
    from .report import table

    if settings.out is not None:
        from . import plot, results

        results.append(settings.out, runs)
        try:
            pictures = plot.draw(runs, settings.out)
        except ImportError as error:
            pictures = []
            print(f"no picture: {error}", file=sys.stderr)
        written = ", ".join([results.NAME, *pictures])
        print(f"{written} in {settings.out}", file=sys.stderr)
    if settings.as_json:
        print(json.dumps(runs, allow_nan=False))
        return
    print("\n\n".join(map(table, runs)))
