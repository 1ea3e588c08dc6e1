"""`fusedlr report` of what optimizers record: scopes that sit out, B matrices at 0, no gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import make_params, scheduled, set_grads, spoil
from torch import nn

from fusedlr import Record, cli
from fusedlr.recorded import Recording
from fusedlr.report.runs import Run
from fusedlr.report.unusual import unusual

strict = pytest.mark.filterwarnings("error", "ignore::fusedlr.FallbackWarning")


def adapters(**options: Any) -> Any:
    """Two adapters whose parameters are called alike, and a group without a scope or names of its own."""
    groups: list[dict[str, Any]] = []
    for scope in ("first", "second"):
        torch.manual_seed(0)
        params = [
            (f"model.layers.{i}.q.lora_{matrix}.weight", p)
            for i in range(6)
            for matrix, p in (
                ("A", nn.Parameter(torch.randn(4, 8))),
                ("B", nn.Parameter(torch.zeros(8, 4))),
            )
        ]
        groups.append({"params": params, "scope": scope})
    groups.append({"params": [("norm [x]$\u03b1$", make_params(shapes=((5,),))[0])]})
    return scheduled(groups, max_grad_norm=1.0, record=Record(), **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A recording with everything that is not a number in it."""
    optimizer = adapters()
    for k in range(12):
        # some tensors never get a gradient, others sometimes
        set_grads(optimizer, k, missing=lambda k, i: i == 2 or (i == 5 and k % 2))
        if k == 7:
            spoil(optimizer)
        optimizer.step(only=None if k % 3 else ["first"])
    path = tmp_path / "run.npz"
    optimizer.record().save(path)
    return path


def test_what_is_recorded_has_all_that_is_not_a_number(saved):
    recording = Recording.load(saved)
    assert (recording["k"] == -1).any() and np.isnan(recording["lr"]).any()
    assert np.isinf(recording["tensor_update_ratio"]).any()
    assert np.isnan(recording["tensor_grad_norm"]).all(0).any()
    assert any(name.endswith("(group 1)") for name in recording["names"])


@strict
def test_every_form_shows_it(saved, tmp_path, capsys):
    for options in ([], ["--csv", tmp_path / "run.csv"]):
        assert cli.main(["report", str(saved), *map(str, options)]) == 0
    shown = capsys.readouterr().out
    assert "layers.0 A group 0" in shown and "layers.5 B group 1" in shown
    assert "nan" not in shown.lower() and "inf" not in shown.replace("info", "").lower()
    pytest.importorskip("matplotlib")
    for ending in ("html", "png"):
        assert cli.main(["report", str(saved), str(saved), "--out", str(tmp_path / f"run.{ending}")]) == 0


@strict
def test_words_are_of_what_happened(saved):
    said = unusual(Run("run", Recording.load(saved)))
    print(said)
    assert [words for words in said if "never moved" in words] == [
        "1 of 25 tensors never moved: model.layers.1.q.lora_A.weight (group 0)"
    ]
    # a norm that is not there is not one that is not finite
    assert not [words for words in said if "not finite" in words or "planned" in words]


@strict
def test_scopes_that_never_took_part_are_shown(tmp_path, capsys):
    optimizer = adapters()
    for k in range(3):
        set_grads(optimizer, k)
        optimizer.step(only=["second"])
    optimizer.record().save(tmp_path / "run.npz")
    assert cli.main(["report", str(tmp_path / "run.npz")]) == 0
    assert "second" in capsys.readouterr().out
