"""What the README shows runs, and prints what it says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedlr

README = Path(__file__).resolve().parent.parent / "README.md"
if not README.exists():
    pytest.skip("the README is not beside the tests", allow_module_level=True)
TEXT = README.read_text()
EXAMPLES = README.parent / "examples"
# packages that a block may need, by what it imports
OPTIONAL = {"fusedlr.hf": "transformers", "accelerate": "accelerate", "trl": "trl", "lightning": "lightning"}
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "import" in block]


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


def test_there_is_something_to_run() -> None:
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs_and_prints_what_it_says(
    block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs = [package for name, package in OPTIONAL.items() if re.search(rf"(from|import) {name}\b", block)]
    for package in needs:
        pytest.importorskip(package)
    names = {"__name__": "readme", **(surroundings(tmp_path) if needs else {})}
    exec(compile(block, str(README), "exec"), names)
    if "FusedSFTTrainer" in names:
        assert issubclass(names["FusedSFTTrainer"], names["SFTTrainer"])
    if "Module" in names:
        made = names["Module"]().configure_optimizers()
        assert made["lr_scheduler"]["scheduler"] is names["optimizer"].scheduler
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
