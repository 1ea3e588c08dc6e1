"""What the commands share: a parser, the choice of a device, a check of folders, text in columns."""

import argparse
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """Mistakes end in one line and exit code 2; argparse would put the whole usage in front of it.

    Options are written out: an abbreviation would change its meaning with the next option that begins so.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message):
        """End the program; `message` names the argument."""
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help)\n")


def add_device(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--device`; `what` is done there."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help=f"where to {what} (default: auto, a GPU where there is one)",
    )


def device(asked: str, parser: argparse.ArgumentParser) -> str:
    """What `--device` comes to here; ends in `parser.error` where there is no such thing."""
    import torch

    gpu = torch.cuda.is_available()
    if asked == "cuda" and not gpu:
        parser.error("argument --device: cuda was asked for, but torch sees no GPU here")
    return "cuda" if gpu and asked != "cpu" else "cpu"


def nearest_folder(path: Path) -> Path:
    """`path` or the nearest above it that exists: what is written there can be renamed to `path`."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A fresh folder in `parent` that is gone afterwards, whatever happened."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".fusedlr-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def writable(path: Path, option: str, parser: argparse.ArgumentParser) -> Path:
    """`path`, absolute, if something can be written there; ends in `parser.error` if not."""
    path = path.expanduser().absolute()
    folder = nearest_folder(path)
    if not folder.is_dir():
        parser.error(f"argument {option}: {folder} is not a folder")
    try:
        # a folder is made, because permissions say nothing of a full or read-only disk
        with temporary_folder(folder):
            pass
    except OSError as error:
        parser.error(f"argument {option}: cannot write in {folder}: {error.strerror}")
    return path


def drawing_path(path: Path, formats: Sequence[str], parser: argparse.ArgumentParser) -> Path:
    """`--out`, absolute, if a drawing of one of the formats (suffixes) can be written there.

    Ends in `parser.error` if not, and if matplotlib, which draws, is missing.
    """
    if path.suffix.lower() not in formats:
        parser.error(f"argument --out: {path} must end in {' or '.join(formats)}")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error(
            "argument --out: a picture needs matplotlib: pip install 'fusedlr[plot]'; "
            "without --out the curves are drawn here"
        )
    return new_file(path, "--out", parser)


def new_file(path: Path, option: str, parser: argparse.ArgumentParser) -> Path:
    """`path`, absolute, if a file can be written there; ends in `parser.error` if not."""
    path = path.expanduser().absolute()
    if path.is_dir():
        parser.error(f"argument {option}: {path} is a folder")
    return writable(path.parent, option, parser) / path.name


def aligned(rows):
    """Rows of text, first column left and the others right aligned, with a rule under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *padded[1:]]))
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
