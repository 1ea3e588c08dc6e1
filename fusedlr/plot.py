"""`fusedlr plot`: schedules drawn in the terminal or into a picture, and described in words.

Mistakes end in `parser.error`: one line and exit code 2. Needs neither torch nor, in a terminal, matplotlib.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from fusedlr.arguments import number
from fusedlr.chart import MARKS
from fusedlr.console import drawing_path
from fusedlr.schedule import Schedule, curves, page, spec

FORMATS = (".png", ".svg")
# where http.server puts the site that `make docs` builds
SITE = "http://localhost:8000"
# curves wider than this look flat
WIDEST = 100  # columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fusedlr plot` to `parser`."""
    count = number(int, 1, 10_000_000)
    add = parser.add_argument
    add(
        "specs",
        nargs="*",
        metavar="SCHEDULE",
        help="name, or name(argument=value, ...) in quotes; several are drawn together, and commas separate "
        f"them too. Arguments may have transformers' names. Names: {', '.join(spec.NAMES)} (default: cosine)",
    )
    add(
        "--warmup-steps",
        type=number(float, 0, 10_000_000),
        metavar="X",
        help="updates of warm-up; below 1 a share of the run (default: 0.05)",
    )
    add("--total-steps", type=count, metavar="N", help="updates in the run (default: 4000)")
    add(
        "--decay-steps",
        type=count,
        metavar="N",
        help="updates of warmup_stable_decay's decay (default: a tenth)",
    )
    add(
        "--min-lr-ratio",
        type=number(float, 0, 1),
        metavar="X",
        help="floor as a share of the peak (default: 0.1 where a floor must be given, else 0)",
    )
    add(
        "--peak",
        type=number(float, 0, 1e6, above=True),
        metavar="X",
        help="peak learning rate (default: none, rates are shares of the peak)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="write a picture, .png or .svg, instead of drawing here (default: draw here)",
    )
    add(
        "--web",
        action="store_true",
        help="write a link to the page on which these schedules can be changed, instead of drawing here "
        "(default: no)",
    )
    add(
        "--site",
        metavar="ADDRESS",
        help=f"with --web, where the pages of docs/ are served (default: {SITE}, where "
        "python -m http.server -d build/site puts them after make docs)",
    )
    add("--describe", action="store_true", help="say in words what each schedule gives (default: no)")
    add(
        "--width",
        type=number(int, 40, 500),
        metavar="N",
        help="columns to draw in (default: the terminal's, at most 100)",
    )
    add(
        "--height",
        type=number(int, 5, 200),
        metavar="N",
        default=15,
        help="rows to draw in (default: %(default)s)",
    )


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Draw what was asked for; returns the exit code."""
    if args.site is not None and not args.web:
        parser.error("argument --site: it says where the page of --web is")
    if args.web and args.out is not None:
        parser.error("argument --out: not with --web, which draws nothing here")
    asked = _asked(args, parser)
    schedules = _built(asked, parser)
    # without --peak, rates are shares of the peak, and absolute levels are taken as shares too
    peak = 1.0 if args.peak is None else args.peak
    try:
        for schedule in schedules.values():
            schedule.resolve(peak)
    except ValueError as error:
        parser.error(f"argument --peak: {error}")
    if args.web:
        print(_link(args, asked))
    elif args.out is not None:
        path = drawing_path(args.out, FORMATS, parser)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            curves.picture(schedules, args.peak, path)
        except OSError as error:
            parser.error(f"argument --out: cannot write {path}: {error.strerror}")
        print(path)
    else:
        width = args.width or min(WIDEST, shutil.get_terminal_size((80, 24)).columns)
        # a window too narrow for the axis is drawn over its edge rather than not at all
        lines = curves.text(schedules, peak, max(width, 40), args.height)
        print("\n".join([*lines, "", *_legend(schedules, peak)]))
    if args.describe:
        print("\n" + "\n\n".join(schedule.describe(args.peak) for schedule in schedules.values()))
    return 0


def _legend(schedules: dict[str, Schedule], peak: float) -> list[str]:
    """A line for every curve: its mark, and the rate of the first and last update."""
    total = curves.length(schedules)
    return [
        f"{mark} {name}: first update {schedule.lr_at(0, peak):.3g}, "
        f"last {schedule.lr_at((schedule.total_steps or total) - 1, peak):.3g}"
        for mark, (name, schedule) in zip(MARKS, schedules.items(), strict=False)
    ]


def _link(args: argparse.Namespace, asked: dict[str, spec.Spec]) -> str:
    """The address of the page docs/explore.md that shows what was asked for."""
    calls = tuple(one.text for one in asked.values())
    standard = page.Address()
    peak = standard.peak if args.peak is None else repr(args.peak)
    site = (args.site or SITE).rstrip("/").removesuffix("/explore.html")
    return f"{site}/explore.html#{replace(standard, schedules=calls, peak=peak).fragment()}"


def _asked(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, spec.Spec]:
    """Every schedule asked for, with all of its arguments, under the text that asks for it."""
    texts = dict.fromkeys(text for argument in args.specs or ["cosine"] for text in spec.split(argument))
    if len(texts) > len(MARKS):
        parser.error(f"argument SCHEDULE: at most {len(MARKS)} schedules fit in one drawing")
    try:
        specs = [spec.parse(text) for text in texts]
    except spec.SpecError as error:
        parser.error(f"argument SCHEDULE: {error}")
    _check_used(args, specs, parser)
    defaults = spec.Defaults(args.warmup_steps, args.total_steps, args.decay_steps, args.min_lr_ratio)
    return {one.text: one.filled(defaults.of(one)) for one in specs}


def _built(asked: dict[str, spec.Spec], parser: argparse.ArgumentParser) -> dict[str, Schedule]:
    """The schedules; what their constructors warn of goes to the terminal in one line each."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            found = {text: one.build() for text, one in asked.items()}
        except spec.SpecError as error:
            parser.error(f"argument SCHEDULE: {error}")
    for message in {str(warning.message) for warning in warned}:
        print(f"{parser.prog}: warning: {message}", file=sys.stderr)
    return found


def _check_used(args: argparse.Namespace, specs: list[spec.Spec], parser: argparse.ArgumentParser) -> None:
    """An option that no schedule takes is a mistake."""
    for option in ("warmup_steps", "total_steps", "decay_steps", "min_lr_ratio"):
        if getattr(args, option) is not None and not any(option in one.takes for one in specs):
            names = ", ".join(one.name for one in specs)
            parser.error(f"argument --{option.replace('_', '-')}: not an argument of {names}")
