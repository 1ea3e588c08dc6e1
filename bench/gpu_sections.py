"""What the GPU suite does, section by section: each a function from its settings to plain data.

A result has `passed` where something can fail, and `left out` with the reason where a tool is not there.
bench/gpu_suite.py runs them.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fusedlr
from fusedlr import backends

from . import endtoend, graphs, parity, providers, syncs, variants
from . import step as step_bench
from .environment import ROOT, environment
from .providers import BASELINE, PROVIDERS, Provider
from .shapes import INVENTORIES, Inventory

Result = dict[str, Any]

# a few shapes of a LoRA adapter; syncs depend on how many there are, not on their size
_SHAPES = [(16, 256), (256, 16), (16, 256), (1024, 16)] * 2
# 16 tensors; the LoRA paper's adapter, 128 of 4 M parameters; all linears at r = 16, 448 of 40 M
_INVENTORIES = ("tiny", "llama-2-7b-qv-r8", "llama-2-7b-all-r16")
# a graph of a step of 30 us runs 3 ms: many times what it takes to start the first
_REPLAYS = 100
# the backends whose kernels are for GPUs
KERNELS = ("cuda", "triton")
# where sanitizer and driver are put by CUDA's own installers, which do not touch PATH
_CUDA_HOMES = ("CUDA_HOME", "CUDA_PATH")


@dataclass(frozen=True)
class Settings:
    """What a section is told."""

    device: str
    out: Path
    steps: int  # watched for syncs
    # keeps what there is so far, should the section be stopped
    keep: Callable[[Result], None] = lambda result: None

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def inventories(self) -> list[Inventory]:
        """The adapters that are timed; on the CPU the smallest alone."""
        return [INVENTORIES[name] for name in (_INVENTORIES if self.on_gpu else _INVENTORIES[:1])]


@dataclass(frozen=True)
class Section:
    """A part of the suite, and the seconds after which it is stopped on a GPU."""

    run: Callable[[Settings], Result]
    seconds: float


def runnable(device: str) -> list[str]:
    """Backends that can run on the device."""
    return [name for name, why in backends.reasons([torch.device(device)]).items() if why is None]


# --- what a step asks of the GPU


def look_at_environment(settings: Settings) -> Result:
    """Machine and versions, and why who cannot run does not."""
    why_not = {name: why for name, why in providers.available(torch.device(settings.device)).items() if why}
    return {**environment(), "cannot run": why_not}


def watch_syncs(settings: Settings) -> Result:
    """Both sync checks on every backend of a GPU."""
    # on the CPU a step's events are the same every time, and the profiler is slow
    steps = settings.steps if settings.on_gpu else min(settings.steps, 3)
    # the C++ kernel never sees a GPU, and may read a number that lies in the host's memory
    names = [name for name in runnable(settings.device) if name != "cpu"]
    found = {name: look_for_syncs(name, settings.device, steps) for name in names}
    found |= {
        f"{name}, record": look_for_syncs(name, settings.device, steps, record=fusedlr.Record())
        for name in names
    }
    return {"passed": bool(found) and all(result["passed"] for result in found.values()), **found}


def look_for_syncs(backend: str, device: str, steps: int, record: fusedlr.Record | None = None) -> Result:
    """Both sync checks on a step with schedule, clipping and a scaler's flags."""
    optimizer = make_optimizer(backend, device, record=record)
    # the first step allocates state and compiles
    optimizer.step()
    on_gpu = device == "cuda"
    reported = syncs.debug_mode_error(optimizer.step, steps) if on_gpu else None
    counts = syncs.trace(optimizer.step, steps, ("CPU", "CUDA") if on_gpu else ("CPU",))
    found = syncs.forbidden(counts.elements())
    return {
        "passed": reported is None and not found,
        "debug mode": reported,
        "forbidden events": dict(found),
        "launches per step": sum(n for name, n in counts.items() if "LaunchKernel" in name) / steps,
    }


def make_optimizer(backend: str, device: str, **options: Any) -> fusedlr.FusedAdamW:
    """An optimizer over LoRA-like tensors with gradients, and the attributes that a GradScaler sets."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in _SHAPES]
    optimizer = fusedlr.FusedAdamW(
        [{"params": params[::2]}, {"params": params[1::2], "lr": 1e-3}],
        lr=1e-4,
        schedule=fusedlr.cosine(warmup_steps=10, total_steps=200),
        max_grad_norm=1.0,
        backend=backend,
        **options,
    )
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(device)
    optimizer.grad_scale = torch.tensor(1.0, device=device)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(0.0, device=device)  # type: ignore[attr-defined]
    return optimizer


def count_launches(settings: Settings) -> Result:
    """Kernels and copies per step of everybody, with and without clipping.

    Ours must be one kernel per bucket and one for the norm, and no copy at all, however many tensors.
    """
    result: Result = {"passed": True}
    for inventory in settings.inventories:
        for clip in (False, True):
            rows = result[f"{inventory.name}, {'with' if clip else 'no'} clipping"] = {}
            for provider in quick(settings.device):
                rows[provider.name] = count = attempt(count_one, provider, inventory, clip, settings)
                if provider.name in (f"fusedlr-{kernels}" for kernels in KERNELS) and settings.on_gpu:
                    right = count.get("kernels") == 1 + clip and count.get("copies to the device") == 0
                    result["passed"] &= right
            settings.keep(result)
    return result


def count_one(provider: Provider, inventory: Inventory, clip: bool, settings: Settings) -> Result:
    device = torch.device(settings.device)
    stepper = prepared(provider, inventory, clip, device)
    return graphs.counts(stepper.step, device, 20 if settings.on_gpu else 2)


def prepared(provider: Provider, inventory: Inventory, clip: bool, device: torch.device) -> providers.Stepper:
    """A stepper past its first steps, with gradients that stay where they are."""
    begin = parity.start(inventory, torch.float32, device)
    stepper = provider.build(begin.parameters(), clip)
    parity.advance(stepper, begin)
    stepper.step()
    return stepper


def attempt(function: Callable[..., Result], *args: Any) -> Result:
    """What a function returns, or its error: one provider that breaks must not take the others' results."""
    try:
        return function(*args)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}


def quick(device: str) -> list[Provider]:
    """Everybody who can run and needs no minutes to start."""
    why_not = providers.available(torch.device(device))
    return [PROVIDERS[name] for name, why in why_not.items() if why is None and not PROVIDERS[name].slow]


# --- tests


def run_graph_tests(settings: Settings) -> Result:
    """The tests of graphs, streams and the tickets."""
    return run_tests(
        settings, "graph-tests", ["tests/gpu/test_on_device.py", "tests/tools/test_graph_example.py"]
    )


def run_other_tests(settings: Settings) -> Result:
    """All other tests marked `gpu`; on the CPU a few of their CPU twins."""
    others = ["tests", "--ignore=tests/gpu/test_on_device.py", "--ignore=tests/tools/test_graph_example.py"]
    reduced = ["tests/step/test_trajectory.py", "-k", "test_fp64_equals_torch and edges"]
    return run_tests(settings, "tests", others if settings.on_gpu else reduced)


def run_tests(settings: Settings, name: str, what: list[str]) -> Result:
    """Run tests in a process of their own; what they print is kept in a file."""
    report, log = settings.out / f"{name}.xml", settings.out / f"{name}.log"
    report.unlink(missing_ok=True)
    mark = "gpu" if settings.on_gpu else "not gpu and not slow"
    command = [sys.executable, "-m", "pytest", "-v", "-m", mark, "-p", "no:cacheprovider"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    settings.keep({"passed": False, "log": log.name})
    with log.open("w") as file:
        run = subprocess.run(
            [*command, *what, f"--junitxml={report.absolute()}"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if not report.exists():
        tail = log.read_text().splitlines()[-3:]
        return {"passed": False, "error": " / ".join(tail), "log": log.name}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    ran = counts["tests"] - counts["skipped"]
    return {"passed": run.returncode == 0 and ran > 0, **counts, "failed tests": failed, "log": log.name}


def sanitize(settings: Settings) -> Result:
    """compute-sanitizer over `bench.sanitized`; on the CPU that script alone."""
    script = [sys.executable, "-m", "bench.sanitized", "--device", settings.device]
    if not settings.on_gpu:
        return {"script": sanitize_with([], script, settings), "passed": True}
    tool = sanitizer()
    if tool is None:
        return {"left out": "compute-sanitizer is not installed"}
    result: Result = {"passed": True}
    for name, kernels in itertools.product(("memcheck", "racecheck", "initcheck"), here(settings.device)):
        command = [tool, "--tool", name, "--error-exitcode", "9"]
        found = sanitize_with(command, [*script, "--backend", kernels], settings)
        result[f"{name}, {kernels}"] = found
        result["passed"] &= found["passed"]
        settings.keep(result)
    return result


def here(device: str) -> list[str]:
    """Backends with kernels of ours that run there."""
    return [name for name in runnable(device) if name in KERNELS]


def sanitize_with(tool: list[str], script: list[str], settings: Settings) -> Result:
    """Run the script under a tool; `passed` if both say that all is well."""
    # without torch's own pools every tensor is an allocation whose end the tool knows
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run([*tool, *script], cwd=ROOT, env=env, capture_output=True, text=True)
    lines = (run.stdout + run.stderr).splitlines()
    with (settings.out / "sanitizer.log").open("a") as log:
        log.write("\n".join([f"$ {' '.join([*tool, *script])}", *lines, ""]))
    if run.returncode and not tool:
        raise RuntimeError(lines[-1] if lines else f"exit code {run.returncode}")
    summary = [line.lstrip("= ") for line in lines if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    return {"passed": run.returncode == 0, "exit code": run.returncode, "says": (summary or lines)[-1:]}


def sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    homes = [os.environ[name] for name in _CUDA_HOMES if name in os.environ] + ["/usr/local/cuda"]
    folders = [os.path.join(home, "bin") for home in homes]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders)
    )


# --- time


def benchmark(settings: Settings) -> Result:
    """Everybody's step on some adapters: gated, then timed in turns, then replayed from a graph."""
    return timed(
        settings, [p.name for p in quick(settings.device)], settings.inventories, clips=(True, False)
    )


def benchmark_compiled(settings: Settings) -> Result:
    """Who compiles for a minute, against the baseline and ours, on one adapter."""
    ours = providers.chosen_backend(torch.device(settings.device))
    why_not = providers.available(torch.device(settings.device))
    slow = [name for name, provider in PROVIDERS.items() if provider.slow and why_not[name] is None]
    if not settings.on_gpu:
        # the C++ that Inductor writes for the CPU takes a minute to compile, and shows nothing of a GPU
        slow = []
    return timed(settings, [BASELINE, *slow, ours], settings.inventories[:2][-1:], clips=(True,))


def timed(
    settings: Settings, names: list[str], inventories: list[Inventory], clips: tuple[bool, ...]
) -> Result:
    """`step.run` on every inventory, and the time of a replay for those who can be captured."""
    device = torch.device(settings.device)
    rounds = None if settings.on_gpu else 2
    result: Result = {"passed": True, "runs": []}
    for inventory in inventories:
        for clip in clips:
            print(f"    {inventory.label}, clip={clip}", flush=True)
            timing = step_bench.Timing(device, clip=clip, rounds=rounds, seconds=2.0)
            found = asdict(step_bench.run(inventory, [PROVIDERS[name] for name in names], timing))
            replays = {}
            for name in names:
                if name not in found["rejected"]:
                    replays[name] = attempt(replay_one, PROVIDERS[name], inventory, clip, settings)
            found["replay"] = {name: replay for name, replay in replays.items() if replay}
            result["runs"].append(found)
            # others may fail the gate, and are not timed then; ours must not
            ours = [name for name in found["rejected"] if name.startswith("fusedlr")]
            result["passed"] &= not ours and bool(found["rows"])
            settings.keep(result)
    return result


def replay_one(provider: Provider, inventory: Inventory, clip: bool, settings: Settings) -> Result:
    """Milliseconds of a replay, nothing for who has nothing to capture."""
    device = torch.device(settings.device)
    stepper = prepared(provider, inventory, clip, device)
    if stepper.capturable is None:
        return {}
    repeats = _REPLAYS if settings.on_gpu else 2
    return {"ms": graphs.replay_ms(stepper.capturable, device, repeats)}


def compare_variants(settings: Settings) -> Result:
    """The kernels with other numbers in them: on a GPU gated and timed, on the CPU a few of them without."""
    chosen = variants.VARIANTS
    if settings.on_gpu:
        chosen = tuple(variant for variant in chosen if variant.backend in here(settings.device))
    else:
        chosen = tuple(variant for variant in chosen if variant.name in variants.REDUCED)
    result: Result = {"passed": True, "rows": []}
    for variant in chosen:
        print(f"    {variant.name}", flush=True)
        found = variants.run(variant, settings.device)
        result["rows"].append({"variant": variant.name, **found})
        result["passed"] &= "error" not in found
        settings.keep(result)
    return result


def end_to_end(settings: Settings) -> Result:
    """Tokens per second of a LoRA run with the Trainer."""
    why = endtoend.missing()
    if why is not None:
        return {"left out": why}
    size, pairs = (endtoend.GPU, 3) if settings.on_gpu else (endtoend.REDUCED, 1)
    return endtoend.run(settings.device, size, pairs)


# cheapest first, and what nothing else shows before what repeats on a GPU what the CPU has shown. The seconds
# are limits, several times what is expected; all together are cut to the suite's own
SECTIONS = {
    "environment": Section(look_at_environment, 30),
    "syncs": Section(watch_syncs, 60),
    "launches": Section(count_launches, 90),
    "graph tests": Section(run_graph_tests, 150),
    "benchmark": Section(benchmark, 150),
    "variants": Section(compare_variants, 180),
    "end to end": Section(end_to_end, 120),
    "sanitizer": Section(sanitize, 150),
    "tests": Section(run_other_tests, 240),
    "compiled": Section(benchmark_compiled, 120),
}
