"""The command line: `fusedlr demo`, `fusedlr info`."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from importlib import metadata

from fusedlr import __version__, demo

# what a bug report should name
_PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # idle OpenMP threads that spin cost up to 20x on a busy machine; torch reads this when it is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(
        prog="fusedlr", description="AdamW with the learning rate schedule fused into its step."
    )
    parser.add_argument("--version", action="version", version=f"fusedlr {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    demo_parser = commands.add_parser(
        "demo",
        help="fine-tune a small model with LoRA and compare with stock AdamW and scheduler",
        description="Train a small base model, fine-tune it with LoRA through the Hugging Face Trainer, "
        "once with fusedlr and once with stock AdamW, scheduler and clipping, and compare.",
    )
    demo.add_arguments(demo_parser)
    commands.add_parser("info", help="versions, devices, and which backend would run; for bug reports")

    args = parser.parse_args(argv)
    if args.command == "demo":
        return demo.run(args, demo_parser)
    print(info())
    return 0


def info() -> str:
    """Versions, devices, and for every device which backend runs there and why the others do not."""
    import torch

    from fusedlr import backends, cpu

    lines = [f"fusedlr {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"{name} {_version(name)}" for name in _PACKAGES]
    lines.append(
        f"CPU threads {torch.get_num_threads()}, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}"
    )
    devices = [torch.device("cpu")]
    if cpu.why_not(devices) is None:
        threads = "with OpenMP" if cpu.openmp() else "without OpenMP: one thread"
        lines.append(f"C++ kernel {threads}; instruction set {cpu.isa()} of {', '.join(cpu.isas())}")
    for i in range(torch.cuda.device_count()):
        lines.append(f"cuda:{i} {torch.cuda.get_device_name(i)}")
        devices.append(torch.device("cuda", i))
    for device in devices:
        lines.append(f"on {device}: backend {backends.choose('auto', [device]).name}")
        lines += [f"  {name}: {why}" for name, why in backends.reasons([device]).items() if why]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
