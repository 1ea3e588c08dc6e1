"""Files that appear whole or not at all: written under another name in the same folder, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write into; it becomes `path` if the block ends without an exception, and is removed if not.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f".fusedlr-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            yield file
            # a rename may reach the disk before what was written
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
