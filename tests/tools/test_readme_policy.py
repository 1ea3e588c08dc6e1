"""The README's benchmark: the default thread policy is its headline, and PASSIVE stands beside it."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "readme_numbers.py"
if not (TOOL.exists() and (TOOL.parent.parent / "README.md").exists()):
    pytest.skip("the README is not beside the tests", allow_module_level=True)


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_numbers", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def a_run(template: dict[str, Any], policy: str, ratio: float) -> dict[str, Any]:
    run = copy.deepcopy(template)
    run["environment"]["omp_wait_policy"] = policy
    for result in run["inventories"]:
        for row in result["rows"]:
            row["ratio"] = dict.fromkeys(("median", "low", "high"), ratio)
    return run


def drawn(tool: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *runs: tuple[str, float]) -> str:
    template = json.loads((tool.RESULTS / "step.json").read_text())[0]
    with monkeypatch.context() as patched:
        patched.setattr(tool, "RESULTS", folder)
        (folder / "step.json").write_text(json.dumps([a_run(template, *run) for run in runs]))
        return str(tool.benchmark())


def test_the_default_policy_leads_whatever_was_measured_last(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = drawn(
        tool, tmp_path, monkeypatch, ("unset", 1.0), ("unset", 2.0), ("ACTIVE", 3.0), ("PASSIVE", 4.0)
    )
    title, _, table = text.partition("\n\n")
    head, _, *rows = table.splitlines()
    assert "default thread policy" in title and "PASSIVE" not in title
    assert head.endswith("| times as fast (quartiles) | `OMP_WAIT_POLICY=PASSIVE` |")
    assert len(rows) == len(tool.INVENTORIES)
    assert all(row.endswith("| 2.00 (2.00 to 2.00) | 4.00 (4.00 to 4.00) |") for row in rows)


def test_a_policy_that_was_measured_alone_is_named(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = drawn(tool, tmp_path, monkeypatch, ("PASSIVE", 4.0))
    assert "`OMP_WAIT_POLICY=PASSIVE`: clipping" in " ".join(text.split()) and "default" not in text
    assert text.count("4.00 (4.00 to 4.00) |\n") == len(tool.INVENTORIES)
