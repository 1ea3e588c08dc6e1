"""The sources in csrc/ as a digest: setup.py compiles it into the modules, compiled.py compares at import."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(csrc: Path, *more: Path) -> str:
    """Of the C++ and CUDA files in the folder `csrc`, and of `more` files.

    "" if it is not our folder, as beside an installed package.
    """
    if not (csrc / "cpu_module.cpp").is_file():
        return ""
    total = hashlib.sha256()
    for path in sorted((*csrc.glob("*.cpp"), *csrc.glob("*.cu"), *csrc.glob("*.h"))) + list(more):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()
