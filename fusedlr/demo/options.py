"""What the demo can be asked to do: its options, their defaults and their checks.

Bad values end in `parser.error`: one line and exit code 2. Imports torch only to look for a GPU.
"""

import argparse
import os
from pathlib import Path

from fusedlr.arguments import number
from fusedlr.console import add_device, device, writable
from fusedlr.demo.settings import SIZES, Settings

# the names transformers gives its schedules, less the two that follow a metric instead of a step count
SCHEDULES = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
)


def default_cache() -> Path:
    """$FUSEDLR_CACHE, else the user's cache directory."""
    if os.environ.get("FUSEDLR_CACHE"):
        return Path(os.environ["FUSEDLR_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusedlr"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to `parser`; what is not given is filled in by `resolve`."""
    count = number(int, 1, 10_000_000)
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="the smallest run, under 40 s on two cores (same as --size quick)",
    )
    add("--size", choices=SIZES, help="model, data and steps (default: small, or large on a GPU)")
    add("--steps", type=count, metavar="N", help="LoRA updates (default: by size, 25, 40 or 200)")
    add(
        "--base-steps",
        type=count,
        metavar="N",
        help="steps that train the base model (default: by size, 250, 350 or 1500)",
    )
    add(
        "--schedule",
        choices=SCHEDULES,
        default="cosine",
        metavar="NAME",
        help="learning rate schedule, by transformers' name: %(choices)s (default: %(default)s)",
    )
    add(
        "--lr",
        type=number(float, 0, 1e6, above=True),
        metavar="X",
        help="peak learning rate of the LoRA runs (default: by size, 0.01, 0.005 or 0.002)",
    )
    add(
        "--warmup",
        type=number(int, 0, 10_000_000),
        metavar="N",
        help="updates of warm-up (default: a tenth of --steps)",
    )
    add(
        "--accumulation",
        type=number(int, 1, 10_000),
        metavar="N",
        default=2,
        help="micro-batches per update (default: %(default)s)",
    )
    add_device(parser, "train")
    add(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        metavar="N",
        default=0,
        help="seed of everything random (default: %(default)s)",
    )
    add(
        "--teeth",
        action=argparse.BooleanOptionalAction,
        help="one more stock run whose warm-up is an update longer: what a wrong schedule would look like "
        "(default: yes, except for the quick size)",
    )
    add(
        "--panel",
        action=argparse.BooleanOptionalAction,
        help="three more runs: schedules at a high rate; left out where they would take too long "
        "(default: yes, except for the quick size)",
    )
    add(
        "--output",
        type=Path,
        default=Path("fusedlr-demo"),
        metavar="DIR",
        help="folder for the report (default: ./%(default)s)",
    )
    add(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder for the tokens and the base model (default: $FUSEDLR_CACHE or ~/.cache/fusedlr)",
    )
    add("--fresh", action="store_true", help="make the tokens and the base model again even if cached")


def resolve(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Settings:
    """Check `args` and fill in what was left to default; ends in `parser.error` where they make no sense."""
    if args.quick and args.size not in (None, "quick"):
        parser.error(f"argument --quick: contradicts --size {args.size}")
    on = device(args.device, parser)
    name = "quick" if args.quick else args.size or ("large" if on == "cuda" else "small")
    size = SIZES[name]
    steps = args.steps or size.steps
    warmup = max(1, steps // 10) if args.warmup is None else args.warmup
    if args.schedule == "constant":
        if args.warmup:
            parser.error("argument --warmup: the constant schedule has none; use constant_with_warmup")
        warmup = 0
        # nothing to lengthen by an update
        args.teeth = False
    if warmup > steps:
        parser.error(f"argument --warmup: {warmup} updates of warm-up do not fit in {steps} updates")
    settings = Settings(
        size_name=name,
        size=size,
        steps=steps,
        base_steps=args.base_steps or size.base_steps,
        schedule=args.schedule,
        lr=args.lr or size.lr,
        warmup=warmup,
        accumulation=args.accumulation,
        device=on,
        seed=args.seed,
        teeth=name != "quick" if args.teeth is None else args.teeth,
        panel=name != "quick" if args.panel is None else args.panel,
        fresh=args.fresh,
        output=_output_folder(args.output, parser),
        cache=writable(args.cache or default_cache(), "--cache", parser),
    )
    try:
        settings.own_schedule()
    except ValueError as error:
        parser.error(f"argument --schedule: {error}")
    return settings


def _output_folder(path: Path, parser: argparse.ArgumentParser) -> Path:
    path = path.expanduser().absolute()
    # the folder's own files are replaced at the end, so it must be empty or a report already
    if path.is_dir() and any(path.iterdir()) and not (path / "report.json").is_file():
        parser.error(f"argument --output: {path} holds other files; name a new folder, or one with a report")
    return writable(path, "--output", parser)
