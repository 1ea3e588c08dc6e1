"""The command line: `fusedlr demo`, `fusedlr bench`, `fusedlr plot`, `fusedlr run`, `fusedlr info`."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib import import_module, metadata, util
from pathlib import Path
from types import ModuleType

from fusedlr import __version__, demo, plot, run
from fusedlr.console import Parser

# the checkout, or where the package is installed
ROOT = Path(__file__).resolve().parent.parent
# what a bug report should name
_PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "numpy")
# they change what runs, and are easily forgotten in a shell; others hold paths
_VARIABLES = ("FUSEDLR_BACKEND", "FUSEDLR_CPU_ISA", "TRITON_INTERPRET")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="fusedlr", description="AdamW with the learning rate schedule fused into its step.")
    parser.add_argument("--version", action="version", version=f"fusedlr {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    demo_parser = commands.add_parser(
        "demo",
        help="fine-tune a small model with LoRA and compare with stock AdamW and scheduler",
        description="Train a small base model, fine-tune it with LoRA through the Hugging Face Trainer, "
        "once with fusedlr and once with stock AdamW, scheduler and clipping, and compare.",
    )
    demo.add_arguments(demo_parser)
    bench_parser = commands.add_parser(
        "bench",
        help="time the step on this machine against stock torch and others",
        description="Check every optimizer's step against a float64 oracle, then time clipping, AdamW and "
        "schedule together on the tensors of LoRA adapters: fusedlr, stock torch, and others that are "
        "installed, interleaved in one run. Without arguments that takes under ten seconds.",
    )
    # a process that trains needs nothing of it
    if argv[:1] == ["bench"]:
        bench_package().add_arguments(bench_parser)
    plot_parser = commands.add_parser(
        "plot",
        help="draw learning rate schedules here or into a picture",
        description="Draw one or several learning rate schedules, here or into a PNG or SVG. "
        "For example: fusedlr plot cosine linear --warmup-steps 200 --total-steps 4000 --peak 1e-5",
    )
    plot.add_arguments(plot_parser)
    run_parser = commands.add_parser(
        "run",
        help="run a training script with every Hugging Face Trainer on FusedAdamW",
        description="Run a script, or with -m a module, in which every Trainer whose optimizer is torch's "
        "AdamW steps with FusedAdamW, as patch_transformers() does. Launchers run it in every process: "
        "torchrun -m fusedlr run train.py, accelerate launch -m fusedlr run train.py",
    )
    run.add_arguments(run_parser)
    commands.add_parser(
        "info",
        help="versions, devices, and which backend would run; for bug reports",
        description="Print versions, devices, the backend that would run on each, and why the others would "
        "not: what a bug report should start with.",
    )

    args, unknown = parser.parse_known_args(argv)
    if unknown:
        # the command's own help has what there is
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.command == "demo":
        if "torch" not in sys.modules:
            # OpenMP, which torch loads, reads this once. A small training run on 2 cores that others use too
            # (load 11, 2026-11-26) takes 0.5 s per update with threads that sleep, 3.6 s with the default
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        return demo.run(args, demo_parser)
    if args.command == "bench":
        return bench_package().run(args, bench_parser)
    if args.command == "plot":
        return plot.run(args, plot_parser)
    if args.command == "run":
        return run.run(args, run_parser)
    print(info())
    return 0


def bench_package() -> ModuleType:
    """`fusedlr.bench`; in a checkout that is not installed its sources lie beside the package."""
    name = "fusedlr.bench"
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    folder = ROOT / "bench"
    spec = util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def info() -> str:
    """Versions, devices, and for every device which backend runs there and why the others do not."""
    import torch

    from fusedlr import backends
    from fusedlr.backends import compiled, cpu
    from fusedlr.backends.gpu import cuda

    lines = [f"fusedlr {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"{name} {_version(name)}" for name in _PACKAGES]
    lines.append(
        f"torch was built for CUDA {torch.version.cuda or 'none'}, ROCm {torch.version.hip or 'none'}"
    )
    lines += [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    lines.append(
        f"CPU threads {torch.get_num_threads()}, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}"
    )
    devices = [torch.device("cpu")]
    if cpu.why_not(devices) is None:
        threads = "with OpenMP" if cpu.openmp() else "without OpenMP: one thread"
        lines.append(f"C++ kernel {threads}; instruction set {cpu.isa()} of {', '.join(cpu.isas())}")
    if compiled.cuda is not None and compiled.cuda.device_type == "cuda":
        inside = ", ".join(map(cuda.dotted, cuda.archs()))
        built = cuda.version(compiled.cuda.toolkit)
        lines.append(f"CUDA kernel built by CUDA {built} for compute capability {inside} and newer")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        lines.append(f"cuda:{i} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {capability}")
        devices.append(torch.device("cuda", i))
    for device in devices:
        try:
            lines.append(f"on {device}: backend {backends.choose('auto', [device]).name}")
        except (RuntimeError, ValueError) as error:
            lines.append(f"on {device}: no backend: {error}")
        lines += [f"  {name}: {why}" for name, why in backends.reasons([device]).items() if why]
    if len(devices) > 1:
        lines.append("float64 tensors on a GPU run through the reference step")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
