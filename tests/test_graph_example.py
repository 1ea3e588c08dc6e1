"""The CUDA graph example trains, with a graph where there is a GPU and without one elsewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

_PATH = Path(__file__).resolve().parent.parent / "examples" / "graph_training.py"
pytestmark = pytest.mark.skipif(not _PATH.exists(), reason="examples are in the checkout alone")


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("graph_training", _PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(device: str, steps: int) -> None:
    result = example().train(device, steps, width=32, layers=2, batch=8)
    assert result["updates"] == steps
    assert result["last_loss"] < 0.9 * result["first_loss"]
    # the last update of a cosine to a tenth: just above a tenth of the peak
    assert 5e-4 < result["last_lr"] < 6e-4


def test_it_trains_without_a_gpu() -> None:
    check("cpu", 60)


@pytest.mark.gpu
def test_it_trains_in_a_graph() -> None:
    check("cuda", 60)


def test_it_says_that_there_is_no_graph(capsys: pytest.CaptureFixture[str]) -> None:
    example().main(["--device", "cpu", "--steps", "10"])
    out = capsys.readouterr().out
    assert "no GPU in use" in out and "last_lr" in out


def test_bad_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example().main(["--steps", "3"])
    assert "--steps 3" in capsys.readouterr().err
