"""`fusedlr run`: a script or module with `patch_transformers()` at work, and not a line of it changed.

It runs in this process as Python would run it, so that launchers start it in each of theirs:
`torchrun -m fusedlr run train.py` and `accelerate launch -m fusedlr run train.py`.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` takes."""
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="a Python file, or a module with -m")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="SCRIPT's own arguments")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the script to its end; what it raises, and its exit code, are its own."""
    script = Path(args.script)
    if not args.module and not script.is_file():
        parser.error(f"argument SCRIPT: there is no file {args.script}")
    try:
        from fusedlr.hf import patch_transformers
    except ImportError as error:
        parser.error(f"transformers cannot be imported ({error}): pip install 'fusedlr[hf]'")
    before = sys.argv, sys.path
    # a module is looked for here, and what a script imports beside it
    folder = Path.cwd() if args.module else script.resolve().parent
    sys.argv, sys.path = [args.script, *args.arguments], [str(folder), *sys.path]
    try:
        with patch_transformers() as patch:
            if args.module:
                runpy.run_module(args.script, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(args.script, run_name="__main__")
    finally:
        sys.argv, sys.path = before
    if not patch.used:
        print(
            f"{parser.prog}: no Trainer asked for torch's AdamW: fusedlr had nothing to do", file=sys.stderr
        )
    return 0
