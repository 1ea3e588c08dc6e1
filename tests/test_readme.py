"""What the README shows runs, and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fusedlr

README = Path(__file__).resolve().parent.parent / "README.md"
if not README.exists():
    pytest.skip("the README is not beside the tests", allow_module_level=True)
TEXT = README.read_text()
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "import" in block]


def test_there_is_something_to_run() -> None:
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs_and_prints_what_it_says(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    for shown in re.findall(r"print\(.*\)  # (\[.*?\])", block):
        assert shown in printed


def test_every_constructor_is_in_the_table() -> None:
    table = TEXT[TEXT.index("## Schedules") : TEXT.index("`linear`, `cosine` and the restarts")]
    first_cells = (line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)\(", cell)}
    constructors = {
        name for name, module in fusedlr._PUBLIC.items() if module == "schedule" and name.islower()
    }
    assert named == constructors - {"total_steps"}


def test_pictures_and_files_it_names_exist() -> None:
    for path in re.findall(r"\]\(([\w/.]+)\)|`(bench/results/[\w.]+)`", TEXT):
        assert (README.parent / next(filter(None, path))).exists(), path
