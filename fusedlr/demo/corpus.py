"""The corpus: prose and code that every Python installation carries, held out by file.

Prose is the language reference in `pydoc_data.topics` and the standard library's docstrings; code is the
library's sources without them. Which files are held out depends on their names only.
"""

import ast
import contextlib
import hashlib
import sysconfig
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from fusedlr.demo.progress import bar

# one file in ten is held out
HELD_OUT = 0.1
# tests repeat themselves, encodings are tables of characters, the rest is installed or generated locally
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "encodings",
    "site-packages",
    "dist-packages",
    "pydoc_data",
    "__pycache__",
}
# shorter texts ("True or False.") teach nothing
SHORTEST = 40  # characters


class CorpusError(RuntimeError):
    """The texts that the demo trains on are missing."""


@dataclass
class Split:
    """Texts to train on and texts held out."""

    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)

    def add(self, name: str, texts: list[str]) -> None:
        """File `texts` under the side that their file's `name` decides."""
        side = self.held_out if is_held_out(name) else self.train
        side.extend(text for text in texts if len(text) >= SHORTEST)


def fraction(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone, the same on every machine.

    >>> round(fraction("json/decoder.py"), 3)
    0.231
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def is_held_out(name: str) -> bool:
    """Whether the file of this relative name, with forward slashes, is kept from training."""
    return fraction(name) < HELD_OUT


def split_source(source: str) -> tuple[list[str], str]:
    r"""The docstrings of a Python source and the source without them.

    >>> split_source('def f():\n    "Double the argument."\n    return 2\n')
    (['Double the argument.'], 'def f():\n    return 2\n')
    """
    with warnings.catch_warnings():
        # old sources have invalid escapes, which is no concern of the reader of a progress bar
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    # split at line feeds only: form feeds are part of some sources and ast does not count them as line ends
    lines = source.split("\n")
    docstrings: list[str] = []
    dropped: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        docstrings.append(text)
        expression = node.body[0]
        first, last = expression.lineno, expression.end_lineno or expression.lineno
        # a docstring that shares its line with code stays there
        alone = not lines[first - 1].encode()[: expression.col_offset].strip()
        if alone and not lines[last - 1].encode()[expression.end_col_offset :].strip():
            dropped.update(range(first, last + 1))
    code = "\n".join(line for number, line in enumerate(lines, 1) if number not in dropped)
    return docstrings, code


def library_files(root: Path) -> list[tuple[str, Path]]:
    """Name and path of the library's sources under `root`, in an order that depends on the names only."""
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        # _sysconfigdata is written when Python is built and describes the machine
        if not SKIPPED_FOLDERS.intersection(relative.parts) and not path.name.startswith("_sysconfigdata"):
            files.append((relative.as_posix(), path))
    return sorted(files, key=lambda item: fraction(item[0]))


def limited(files: list[tuple[str, Path]], size: int) -> list[tuple[str, Path]]:
    """The first of `files` that make up `size` bytes, the usual share of them held out."""
    left = {True: size * HELD_OUT, False: size * (1 - HELD_OUT)}
    chosen = []
    for name, path in files:
        side = is_held_out(name)
        if left[side] > 0:
            chosen.append((name, path))
            left[side] -= path.stat().st_size
    return chosen


def read_corpus(size: int = 0, root: Path | None = None) -> tuple[Split, Split]:
    """Prose and code, each split by file. `size` in bytes limits the library's share, 0 means all of it.

    Raises CorpusError where the standard library's sources are not installed.
    """
    prose, code = Split(), Split()
    with contextlib.suppress(ImportError):
        from pydoc_data.topics import topics

        for name, text in sorted(topics.items()):
            prose.add(f"pydoc_data/{name}", [text])
    files = library_files(root or Path(sysconfig.get_path("stdlib")))
    if size:
        files = limited(files, size)
    for name, path in bar(files, label="reading the library"):
        try:
            source = path.read_text(encoding="utf-8")
            docstrings, rest = split_source(source)
        except (OSError, SyntaxError, ValueError):
            continue  # a template or a file in another encoding
        prose.add(name, docstrings)
        code.add(name, [rest])
    if not all((prose.train, prose.held_out, code.train, code.held_out)):
        raise CorpusError("the sources of the Python standard library are not installed here")
    return prose, code
