"""Results as data: `step.json` holds every run, oldest first, each with the machine it ran on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

# raised when the meaning of a key changes
SCHEMA = 1
NAME = "step.json"


class ResultsError(Exception):
    """A file of results that is none."""


def read(folder: Path) -> list[dict[str, Any]]:
    """The runs kept in `folder`, none where there is no file.

    Raises:
        ResultsError: the file cannot be read, or holds something else.
    """
    path = folder / NAME
    try:
        runs = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} cannot be read: {error}") from None
    if not isinstance(runs, list) or not all(isinstance(run, dict) and "schema" in run for run in runs):
        raise ResultsError(f"{path} is not a list of benchmark runs")
    return runs


def append(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Add runs to those kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{NAME}.part"
    part.write_text(json.dumps([*read(folder), *runs], indent=1, allow_nan=False) + "\n")
    # a rename, so that a reader never sees half a file
    os.replace(part, folder / NAME)
