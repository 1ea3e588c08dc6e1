"""What the benchmark can be asked for: its options, their defaults and their checks.

Bad values end in `parser.error`: one line and exit code 2.
"""

from __future__ import annotations

import argparse
import fnmatch
from dataclasses import dataclass
from pathlib import Path

from fusedlr.arguments import number
from fusedlr.console import add_device, device, writable

from .shapes import DEFAULT, INVENTORIES, MODELS, RANKS, Inventory

# how adapters are named, in words
NAMES = (
    f"tiny, or MODEL-TARGETS-rRANK of {', '.join(model.label.lower() for model in MODELS)}; qv, all; "
    f"{', '.join(map(str, RANKS))}"
)
# among the names of inventories: the section of bench/host.py
HOST = "host"
# option -> values of OMP_WAIT_POLICY, each measured in a process of its own; None leaves the variable unset
WAIT_POLICIES: dict[str, tuple[str | None, ...]] = {
    "default": (None,),
    "passive": ("PASSIVE",),
    "active": ("ACTIVE",),
    "both": (None, "PASSIVE"),
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run of the benchmark, checked and with no default left open."""

    inventories: tuple[Inventory, ...]
    host: bool
    sweep: bool
    providers: tuple[str, ...]
    chosen: bool  # whether the providers were chosen by name
    clip: bool
    dtype: str
    device: str
    threads: int
    rounds: int | None
    seconds: float
    policies: tuple[str | None, ...]  # empty: the one that this process has
    out: Path | None
    as_json: bool

    def arguments(self) -> list[str]:
        """The command line that measures the same in its process's own wait policy and prints JSON."""
        return [
            *(inventory.name for inventory in self.inventories),
            *([HOST] if self.host else []),
            *(["--sweep"] if self.sweep else []),
            *([f"--providers={','.join(self.providers)}"] if self.chosen else []),
            "--clip" if self.clip else "--no-clip",
            f"--dtype={self.dtype}",
            f"--device={self.device}",
            f"--threads={self.threads}",
            f"--rounds={self.rounds}" if self.rounds else f"--seconds={self.seconds}",
            "--json",
        ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options to `parser`; what is not given is filled in by `resolve`."""
    add = parser.add_argument
    add(
        "inventories",
        nargs="*",
        metavar="INVENTORY",
        help=f"adapters to update: {NAMES}. Shell patterns work: 'llama-*-qv-r8'. '{HOST}' is another "
        "measurement: the host's time for many tiny tensors, fp32, with clipping, for each way in which "
        f"fusedlr's step can be driven (default: {DEFAULT})",
    )
    add("--all", action="store_true", help="all inventories for which there is memory (default: no)")
    add(
        "--sweep",
        action="store_true",
        help="also more and more tensors of a fixed total size, and a fixed number of growing ones: fused "
        "and fusedlr, unless --providers says otherwise (default: no)",
    )
    add(
        "--providers",
        metavar="NAMES",
        help="who is timed, with commas: fused, foreach, forloop, capturable (torch), compile (minutes), "
        "fusedlr-BACKEND, fusedlr-cpu-master (master_weights=True, for --dtype bfloat16), "
        "fusedlr-cpu-record (record=Record()), torchao, "
        "bitsandbytes, apex, optimi, deepspeed (its first use compiles C++, which takes minutes). fused "
        "is the baseline and always among them (default: all that can run here, "
        "without compile and torchao, which compile in every run, and fusedlr-cpu-master and -record)",
    )
    add(
        "--clip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="clip to the norm of all gradients (default: yes)",
    )
    add(
        "--threads",
        type=number(int, 1, 4096),
        metavar="N",
        help="CPU threads (default: as many as torch takes)",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--rounds",
        type=number(int, 1, 100_000),
        metavar="N",
        help="rounds in which every provider is timed once (default: what fits into --seconds, at least 5)",
    )
    length.add_argument(
        "--seconds",
        type=number(float, 0, 1e5, above=True),
        metavar="X",
        default=1.5,
        help="time for the rounds of an inventory (default: %(default)s)",
    )
    add(
        "--wait-policy",
        choices=("inherit", *WAIT_POLICIES),
        default="inherit",
        help="what idle OpenMP threads do: spin for a while and then sleep (default, with OMP_WAIT_POLICY "
        "unset), sleep at once (passive) or spin (active); both is default and passive. The policy is fixed "
        "when a process starts, so each is measured in a process of its own (default: inherit, the policy "
        "that this process has)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of parameters and gradients (default: %(default)s)",
    )
    add_device(parser, "update")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for step.json, to which the run is appended, and pictures (default: none is written)",
    )
    add("--json", action="store_true", help="print what --out would append, and no table (default: no)")


def resolve(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Settings:
    """Check `args` and fill in what was left to default; ends in `parser.error` where they make no sense."""
    inventories = _inventories(args, parser)
    import torch

    on = device(args.device, parser)
    return Settings(
        inventories=inventories,
        host=HOST in args.inventories,
        sweep=args.sweep,
        providers=_providers(args.providers, on, parser),
        chosen=args.providers is not None,
        clip=args.clip,
        dtype=args.dtype,
        device=on,
        threads=args.threads or torch.get_num_threads(),
        rounds=args.rounds,
        seconds=args.seconds,
        policies=WAIT_POLICIES.get(args.wait_policy, ()),
        out=None if args.out is None else _out(args.out, parser),
        as_json=args.json,
    )


def _inventories(args: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[Inventory, ...]:
    patterns = [pattern for pattern in args.inventories if pattern != HOST]
    if args.all and patterns:
        parser.error("argument --all: names all inventories already, so no other can be named")
    if not args.inventories:
        patterns = [DEFAULT]
    names: dict[str, None] = {}
    for pattern in ["*"] if args.all else patterns:
        found = fnmatch.filter(INVENTORIES, pattern.lower())
        if not found:
            parser.error(f"argument INVENTORY: {pattern} matches none of {NAMES}")
        names.update(dict.fromkeys(found))
    return tuple(INVENTORIES[name] for name in names)


def _providers(asked: str | None, device: str, parser: argparse.ArgumentParser) -> tuple[str, ...]:
    import torch

    from .providers import BASELINE, PROVIDERS, available

    if asked is None:
        why_not = available(torch.device(device))
        return tuple(name for name, why in why_not.items() if why is None and not PROVIDERS[name].slow)
    names = dict.fromkeys([BASELINE, *(name.strip() for name in asked.split(","))])
    for name in names:
        if name not in PROVIDERS:
            parser.error(f"argument --providers: {name!r} is none of {', '.join(PROVIDERS)}")
        why = PROVIDERS[name].why_not(torch.device(device))
        if why is not None:
            parser.error(f"argument --providers: {name}: {why}")
    return tuple(names)


def _out(path: Path, parser: argparse.ArgumentParser) -> Path:
    from .results import ResultsError, read

    path = writable(path, "--out", parser)
    try:
        # before minutes of measuring, not after
        read(path)
    except ResultsError as error:
        parser.error(f"argument --out: {error}")
    return path
