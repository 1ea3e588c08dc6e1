"""One look for the demo's progress bars, on a terminal and in a log file."""

import shutil
import sys
from typing import Any

# no unit and no rate: on 80 columns the room is for the loss and the learning rate
FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
WIDEST = 110  # columns


def bar(iterable: Any = None, *, label: str, total: int | None = None, keep: bool = True) -> Any:
    """A tqdm bar on stderr; where stderr is no terminal it is redrawn every 5 s only.

    A bar that is not to `keep` disappears when it is full.
    """
    from tqdm import tqdm

    return tqdm(
        iterable,
        desc=f"{label:<24}",
        total=total,
        leave=keep,
        file=sys.stderr,
        mininterval=0.1 if sys.stderr.isatty() else 5.0,
        # tqdm hides its bars where a terminal (docker -t, say) reports no size
        nrows=24,
        ncols=min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns),
        bar_format=FORMAT,
    )
