"""What the README and the pages in docs/ show runs, and prints what it says; links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import ROOT, module_at

import fusedlr
from fusedlr import cli
from fusedlr.schedule import CONSTRUCTORS

README = ROOT / "README.md"
if not README.exists():
    pytest.skip("the README is not beside the tests", allow_module_level=True)
TEXT = README.read_text()
EXAMPLES = ROOT / "examples"
# packages that a block may need, by what it imports
OPTIONAL = {
    "fusedlr.hf": "transformers",
    "accelerate": "accelerate",
    "trl": "trl",
    "lightning": "lightning",
    "peft": "peft",
}
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# a block of code that needs more than it shows says so in its first line
NEEDS_GPU = "# needs a GPU"


def blocks(language: str) -> list[object]:
    found = []
    for page in PAGES:
        for i, code in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)):
            found.append(pytest.param(code, id=f"{page.name}-{i}"))
    return found


PYTHON = blocks("python")


def surroundings(folder: Path) -> dict[str, Any]:
    """What the snippets for trainers take for granted: a model, data, an optimizer, arguments."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    tiny = runpy.run_path(str(EXAMPLES / "tiny.py"))
    model, dataset = tiny["lora_model"](), tiny["dataset"]()
    schedule = fusedlr.cosine(warmup_steps=1, total_steps=2)
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, save_strategy="no", report_to="none", disable_tqdm=True
    )
    return {
        "model": model,
        "dataset": dataset,
        "args": args,
        "loader": torch.utils.data.DataLoader(dataset, batch_size=4),
        "optimizer": fusedlr.FusedAdamW(model.parameters(), schedule=schedule),
    }


def test_there_is_something_to_run():
    pages = {str(block.id).rsplit("-", 1)[0] for block in PYTHON}
    assert {"README.md", "schedules.md", "migrating.md", "troubleshooting.md", "how-it-works.md"} <= pages


@pytest.mark.parametrize("code", PYTHON)
def test_code_runs_and_prints_what_it_says(code, capsys, tmp_path, monkeypatch):
    if "import" not in code:
        # a fragment of somebody's loop
        ast.parse(code)
        return
    if code.startswith(NEEDS_GPU) and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    needs = [package for name, package in OPTIONAL.items() if re.search(rf"(from|import) {name}\b", code)]
    for package in needs:
        pytest.importorskip(package)
    names = {"__name__": "readme", **(surroundings(tmp_path) if needs else {})}
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README or docs", "exec"), names)
    if "FusedSFTTrainer" in names:
        assert issubclass(names["FusedSFTTrainer"], names["SFTTrainer"])
    if "Module" in names:
        made = names["Module"]().configure_optimizers()
        assert made["lr_scheduler"]["scheduler"] is names["optimizer"].scheduler
    printed = capsys.readouterr().out.splitlines()
    # a value, up to a colon; words alone are a remark
    for shown in re.findall(r"print\(.*\)  # ([\[\d][^:\n]*|True)", code):
        assert shown in printed


@pytest.mark.parametrize("code", blocks("sh"))
def test_commands_exist(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] in ("fusedlr", "make", "pip", "python"), line
        if words[0] == "make":
            assert words[1] in targets
        if words[:2] == ["fusedlr", "plot"] and (
            "--out" not in words or importlib.util.find_spec("matplotlib")
        ):
            assert cli.main(words[1:]) == 0


def test_every_constructor_is_in_the_table():
    table = TEXT[TEXT.index("## Schedules") : TEXT.index("`linear`, `cosine` and the restarts")]
    first_cells = (line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    named = {name for cell in first_cells for name in re.findall(r"`(\w+)\(", cell)}
    assert named == set(CONSTRUCTORS)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for path in re.findall(r"`(bench/results/[\w.]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_the_readme_is_short():
    assert len(TEXT.splitlines()) <= 150


# docs/


def test_pictures_are_those_that_the_script_draws():
    pytest.importorskip("matplotlib")
    drawn = {f"{name}.svg" for name in module_at(ROOT / "docs" / "make_pictures.py").PICTURES}
    recorded = {f"recorded_{name}.png" for name in module_at(ROOT / "docs" / "make_recordings.py").EXAMPLES}
    trained = {module_at(ROOT / "docs" / "make_master_weights.py").PICTURE.name}
    assert {path.name for path in (ROOT / "docs" / "pictures").iterdir()} == drawn | recorded | trained
    for name, pictures in (
        ("schedules.md", drawn),
        ("watching.md", recorded),
        ("master-weights.md", trained),
    ):
        page = (ROOT / "docs" / name).read_text()
        assert set(re.findall(r"\(pictures/([\w.]+)\)", page)) == pictures


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "api.md").read_text()
    listed = set(re.findall(r"^::: (\S+)$", page, re.M))
    public = {f"fusedlr.{name}" for name in fusedlr.__all__ if name != "lora"}
    public |= {f"fusedlr.lora.{name}" for name in fusedlr.lora.__all__}
    assert public <= listed
    pytest.importorskip("transformers")
    hf = importlib.import_module("fusedlr.hf")
    assert {f"fusedlr.hf.{name}" for name in hf.__all__} <= listed


# modules whose messages go to people at a command line, in full
COMMANDS = ("__init__", "cli", "console", "plot", "spec")


def messages() -> list[str]:
    """What the package raises, warns with, or names as the reason for either; values are left open."""
    found = []
    for path in sorted((ROOT / "fusedlr").rglob("*.py")):
        if path.stem in COMMANDS or path.parent.name == "demo":
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            texts: list[ast.AST] = []
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                # argparse shows its errors at a command line
                if not ast.unparse(node.exc.func).startswith("argparse."):
                    texts = list(node.exc.args[:1])
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("warn"):
                texts = list(node.args[:1])
            elif isinstance(node, ast.FunctionDef) and "misfit" in node.name:
                texts = [one.value for one in ast.walk(node) if isinstance(one, ast.Return) and one.value]
            for text in texts:
                parts = [one.value for one in ast.walk(text) if isinstance(one, ast.Constant)]
                words = "\0".join(part for part in parts if isinstance(part, str))
                if len(words) > 8:
                    found.append(words)
    return found


def test_every_message_is_explained():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = "\n".join(line for line in page.splitlines() if line.startswith("| "))
    shown = [part.strip() for words in re.findall(r"`([^`]+)`", rows) for part in words.split("...")]
    shown = [part for part in shown if len(part) >= 6]
    said = messages()
    assert len(said) > 80
    assert not [words for words in said if not any(part in words for part in shown)]
