"""The CUDA graph example trains, with a graph where there is a GPU and without one elsewhere."""

from __future__ import annotations

from types import ModuleType

import pytest
from kit import ROOT, module_at

_PATH = ROOT / "examples" / "graph_training.py"
pytestmark = pytest.mark.skipif(not _PATH.exists(), reason="examples are in the checkout alone")


def example() -> ModuleType:
    return module_at(_PATH)


def check(device: str, steps: int) -> None:
    result = example().train(device, steps, width=32, layers=2, batch=8)
    assert result["updates"] == steps
    assert result["last_loss"] < 0.9 * result["first_loss"]
    # the last update of a cosine to a tenth: just above a tenth of the peak
    assert 5e-4 < result["last_lr"] < 6e-4


def test_it_trains_without_a_gpu():
    check("cpu", 60)


@pytest.mark.gpu
def test_it_trains_in_a_graph():
    check("cuda", 60)


def test_it_says_that_there_is_no_graph(capsys):
    example().main(["--device", "cpu", "--steps", "10"])
    out = capsys.readouterr().out
    assert "no GPU in use" in out and "last_lr" in out


def test_bad_arguments_are_named(capsys):
    with pytest.raises(SystemExit):
        example().main(["--steps", "3"])
    assert "--steps 3" in capsys.readouterr().err
