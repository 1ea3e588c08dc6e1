"""Folders that appear whole or not at all: written under a temporary name, then renamed.

Used for cache entries and for the report. Ctrl-C or a crash leaves what was there before.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusedlr.console import temporary_folder

# raised whenever the contents of a cache entry change their meaning
FORMAT = 1


def cache_entry(cache: Path, kind: str, **key: Any) -> Path:
    """The folder in `cache` for what `key` decides, for example `data-0123456789abcdef`.

    >>> cache_entry(Path("c"), "data", size="quick") == cache_entry(Path("c"), "data", size="small")
    False
    """
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    return cache / "demo" / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def new_entry(entry: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `entry` if the block ends without an exception."""
    with temporary_folder(entry.parent) as folder:
        content = folder / "content"
        content.mkdir()
        yield content
        if entry.exists():
            # a folder can only be renamed onto an empty one, so the old one moves out of the way first
            os.rename(entry, folder / "old")
        try:
            os.rename(content, entry)
        except OSError:
            # another process was as far at the same moment, and its entry is as good
            if not entry.exists():
                raise


def publish(staged: Path, output: Path) -> None:
    """Move everything in `staged` to `output`, replacing entries of the same name and touching no others."""
    output.mkdir(parents=True, exist_ok=True)
    # report.json comes last: it marks the folder as a finished report
    for source in sorted(staged.iterdir(), key=lambda path: path.name == "report.json"):
        target = output / source.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(source, target)
