"""The numbers in the README and in docs/schedules.md are those of the files they come from."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
from kit import ROOT, module_at

TOOL = ROOT / "tools" / "readme_numbers.py"
if not (TOOL.exists() and (TOOL.parent.parent / "README.md").exists()):
    pytest.skip("the README is not beside the tests", allow_module_level=True)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return module_at(TOOL)


def test_pages_are_up_to_date(tool):
    # if not: python tools/readme_numbers.py
    assert tool.main(["--check"]) == 0


def test_every_section_has_its_place(tool):
    places = [found[2] for page in tool.PAGES for found in tool.MARKED.finditer(page.read_text())]
    assert sorted(places) == sorted(tool.SECTIONS)


def test_an_edited_number_is_found_and_put_right(tool, tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    text = tool.PAGES[0].read_text()
    wrong = text.replace("times as fast (quartiles) |", "times as fast (quartiles) | 99")
    assert wrong != text
    page.write_text(wrong)
    monkeypatch.setattr(tool, "PAGES", (page,))
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    assert tool.main(["--check"]) == 1 and page.read_text() == wrong
    assert "README.md does not have the numbers" in capsys.readouterr().out
    assert tool.main([]) == 0 and page.read_text() == text


def test_a_new_result_changes_the_page(tool, tmp_path, monkeypatch):
    before = tool.benchmark()
    runs = json.loads((tool.RESULTS / "step.json").read_text())
    new = runs[-1]
    (row,) = [row for row in new["inventories"][0]["rows"] if row["provider"] == "fusedlr-cpu"]
    row["ratio"]["median"] = 1234.0
    (tmp_path / "step.json").write_text(json.dumps([*runs, new]))
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    assert tool.benchmark() != before and "1234.00" in tool.benchmark()
