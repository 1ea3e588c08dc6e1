"""The command line: `fusedlr demo`, `bench`, `plot`, `report`, `run` and `info`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module, util
from pathlib import Path
from types import ModuleType

from fusedlr import __version__, demo, info, plot, report, run
from fusedlr.console import Parser

# the checkout, or where the package is installed
ROOT = Path(__file__).resolve().parent.parent


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
    report_parser = commands.add_parser(
        "report",
        help="show what a recorded run did and what is unusual in it",
        description="Show the rates of a recorded run against what was planned, its norms, limits and skips, "
        "how much its layers moved, and what is unusual, here or as a PNG or HTML file; two runs "
        "side by side. For example: fusedlr report run.npz --out run.html",
    )
    report.add_arguments(report_parser)
    run_parser = commands.add_parser(
        "run",
        help="run a training script with every Hugging Face Trainer on FusedAdamW",
        description="Run a script, or with -m a module, in which every Trainer whose optimizer is torch's "
        "AdamW steps with FusedAdamW, as patch_transformers() does. Launchers run it in every process: "
        "torchrun -m fusedlr run train.py, accelerate launch -m fusedlr run train.py",
    )
    run.add_arguments(run_parser)
    info_parser = commands.add_parser(
        "info",
        help="versions, devices, which backend would run, and the compiled CUDA kernels; for bug reports",
        description="Print versions, devices, the backend that would run on each, why the others would not, "
        "and which CUDA kernels are compiled: what a bug report should start with. CUDA kernels are compiled "
        "at the first step on a GPU; --compile does it now.",
    )
    info.add_arguments(info_parser)

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
    if args.command == "report":
        return report.run(args, report_parser)
    if args.command == "run":
        return run.run(args, run_parser)
    return info.run(args, info_parser)


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
