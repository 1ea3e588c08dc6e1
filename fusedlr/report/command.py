"""The options of `fusedlr report`, its files, and what is made of them.

Mistakes end in `parser.error`: one line and exit code 2. Needs no torch, and matplotlib for `--out` alone.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from fusedlr.arguments import number
from fusedlr.console import drawing_path, new_file
from fusedlr.files import replacing
from fusedlr.recorded import Recording

FORMATS = (".png", ".html")
# curves wider than this look flat
WIDEST = 100  # columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fusedlr report` to `parser`."""
    add = parser.add_argument
    add(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="what Recording.save wrote; one or two",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="write a picture, .png, or a page that needs no network, .html (default: draw here)",
    )
    add("--csv", type=Path, metavar="FILE", help="write all numbers, a row for every step (default: no)")
    add(
        "--width",
        type=number(int, 60, 500),
        metavar="N",
        help="columns to draw in (default: the terminal's, 60 to 100)",
    )
    add(
        "--height",
        type=number(int, 5, 200),
        metavar="N",
        default=12,
        help="rows of a curve drawn here (default: %(default)s)",
    )


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Draw or write what was asked for; returns the exit code."""
    if len(args.files) > 2:
        parser.error(f"argument FILE: {len(args.files)} files were given, and two are laid side by side")
    out = None if args.out is None else drawing_path(args.out, FORMATS, parser)
    table = None if args.csv is None else new_file(args.csv, "--csv", parser)
    recordings = [_read(path, parser) for path in args.files]
    from fusedlr.report.runs import Run
    from fusedlr.report.tables import numbers

    # files of one name are told apart by their folders
    names = {path.stem for path in args.files}
    labels = [path.stem if len(names) == len(args.files) else str(path) for path in args.files]
    runs = [Run(label, recording) for label, recording in zip(labels, recordings, strict=True)]
    if table is not None:
        _write(table, numbers(runs).encode(), "--csv", parser)
    if out is not None:
        if out.suffix.lower() == ".html":
            from fusedlr.report.page import page

            _write(out, page(runs).encode(), "--out", parser)
        else:
            from fusedlr.report.picture import png

            _write(out, png(runs), "--out", parser)
    if out is None and table is None:
        from fusedlr.report.terminal import text

        width = args.width or min(WIDEST, max(60, shutil.get_terminal_size((80, 24)).columns))
        print("\n".join(text(runs, width, args.height)))
    return 0


def _read(path: Path, parser: argparse.ArgumentParser) -> Recording:
    try:
        recording = Recording.load(path)
    except OSError as error:
        parser.error(f"argument FILE: cannot read {path}: {error.strerror}")
    except (ValueError, ImportError) as error:
        parser.error(f"argument FILE: {error}")
    if not len(recording["step"]):
        parser.error(f"argument FILE: {path} has no step: it was saved before the first one")
    return recording


def _write(path: Path, data: bytes, option: str, parser: argparse.ArgumentParser) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        parser.error(f"argument {option}: cannot write {path}: {error.strerror}")
    print(path)
