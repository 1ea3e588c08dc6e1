"""Compiled kernels on disk, so that a machine compiles them once. A cache that cannot be used costs a compile
and is never an error.

Entries are files under a digest of all that they were made from. A damaged one is not used; several processes
may read, write and remove at once, because entries appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fusedlr.backends.gpu.nvrtc import Compiled
from fusedlr.files import replacing

# all that is kept, in bytes: kernels for one GPU take 2 MB, so tens of versions and GPUs fit
LIMIT = 64 * 2**20
_SUFFIX = ".kernels"


def key_of(source: str, headers: Mapping[str, str], *others: Any) -> str:
    """A digest of a source, its headers and whatever else decides what is made of them."""
    return hashlib.sha256(json.dumps([source, sorted(headers.items()), others]).encode()).hexdigest()


class Cache:
    """A folder of compiled kernels.

    Attributes:
        folder: where they are; it is made when the first is written. None where there is no home for it.
    """

    def __init__(self, folder: Path | None, limit: int = LIMIT) -> None:
        self.folder, self._limit = folder, limit

    @staticmethod
    def of_user() -> Cache:
        """The folder in `FUSEDLR_CACHE`, or `fusedlr` in the user's cache folder."""
        given = os.environ.get("FUSEDLR_CACHE")
        if given:
            return Cache(Path(given).expanduser())
        try:
            home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError:
            # a user without a home
            return Cache(None)
        return Cache(Path(home) / "fusedlr")

    def where(self) -> str:
        """In words, where compiled kernels are kept, or why they are not."""
        why = self.why_not()
        return f"they are kept in {self.folder}" if why is None else f"they are not kept: {why}"

    def why_not(self) -> str | None:
        """Why nothing is kept, or None as far as that is known before the first is written."""
        if self.folder is None:
            return "there is no home folder: set FUSEDLR_CACHE"
        try:
            found = self.folder.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"its folder cannot be read: {error.strerror}"
        if not stat.S_ISDIR(found.st_mode):
            return "a file is in the place of its folder"
        # whoever can write there could have this process run code of theirs
        if found.st_uid != os.getuid():
            return "its folder belongs to another user"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return "other users can write to its folder"
        return None

    def read(self, key: str) -> Compiled | None:
        """The entry under a key; None if there is none, or none that is whole."""
        if self.folder is None or self.why_not() is not None:
            return None
        path = self._path(key)
        try:
            checksum, names, image = path.read_bytes().split(b"\n", 2)
            if hashlib.sha256(names + b"\n" + image).hexdigest().encode() != checksum:
                return None
            compiled = Compiled(image, json.loads(names), "")
        except (OSError, ValueError):
            return None
        # the oldest ones are removed first, by when they were last used
        with suppress(OSError):
            os.utime(path)
        return compiled

    def write(self, key: str, compiled: Compiled) -> bool:
        """Keep an entry; whether that was possible."""
        if self.folder is None or self.why_not() is not None:
            return False
        names = json.dumps(compiled.names).encode()
        checksum = hashlib.sha256(names + b"\n" + compiled.image).hexdigest().encode()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replacing(self._path(key)) as entry:
                entry.write(b"\n".join([checksum, names, compiled.image]))
        except OSError:
            # the disk may be full or read-only
            return False
        self._trim()
        return True

    def entries(self) -> list[Path]:
        """The entries, the one used last first."""
        return [path for _, _, path in sorted(self._found(), reverse=True)]

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(size for _, size, _ in self._found())

    def clear(self) -> int:
        """Remove all entries; returns how many there were. Other files are left alone."""
        removed = 0
        for path in self.entries():
            with suppress(OSError):
                path.unlink()
                removed += 1
        return removed

    def _trim(self) -> None:
        """Remove entries until what is left fits, those not used for longest first."""
        total = 0
        for _, size, path in sorted(self._found(), reverse=True):
            total += size
            if total > self._limit:
                with suppress(OSError):
                    path.unlink()

    def _found(self) -> Iterator[tuple[float, int, Path]]:
        if self.folder is None:
            return
        for path in self.folder.glob(f"*{_SUFFIX}"):
            # another process may just have removed it
            with suppress(OSError):
                found = path.stat()
                yield found.st_mtime, found.st_size, path

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}{_SUFFIX}"
