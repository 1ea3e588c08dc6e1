"""`fusedlr info` names what a bug report needs, and fails on nothing that one may be about."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

import fusedlr
from fusedlr import backends, cli
from fusedlr.backends import compiled
from fusedlr.backends.gpu import triton


def test_it_names_versions_devices_and_reasons():
    text = cli.info()
    assert text.startswith(f"fusedlr {fusedlr.__version__}, Python {sys.version.split()[0]}")
    assert f"torch {torch.__version__}" in text
    device = torch.device("cpu")
    assert f"on cpu: backend {backends.choose('auto', [device]).name}" in text
    for name, why in backends.reasons([device]).items():
        assert (f"  {name}: {why}" in text) == (why is not None)


@pytest.mark.parametrize("name", ["triton", "no such backend"])
def test_a_backend_that_cannot_run_is_reported(name, monkeypatch):
    monkeypatch.setenv("FUSEDLR_BACKEND", name)
    monkeypatch.setattr(triton, "_why_not_on", lambda device: "Triton cannot be imported")
    text = cli.info()
    assert f"\nFUSEDLR_BACKEND={name}\n" in text
    assert f"on cpu: no backend: FUSEDLR_BACKEND={name!r} " in text


def test_it_says_which_gpus_are_inside(monkeypatch):
    module = SimpleNamespace(device_type="cuda", archs="75 90 120", toolkit=12080)
    monkeypatch.setattr(compiled, "cuda", module)
    inside = "CUDA kernel built by CUDA 12.8 for compute capability 7.5, 9.0, 12.0 and newer"
    assert inside in cli.info().splitlines()


def test_it_can_be_pasted(monkeypatch):
    monkeypatch.setenv("FUSEDLR_CACHE", str(cli.ROOT))
    # where the package lies is nobody's business
    assert str(cli.ROOT) not in cli.info()


@pytest.mark.parametrize("command", ["demo", "bench", "plot", "info"])
def test_an_unknown_option_is_one_line_that_names_the_command(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--nonsense"])
    assert stopped.value.code == 2
    expected = f"fusedlr {command}: error: unrecognized arguments: --nonsense (fusedlr {command} --help)"
    assert capsys.readouterr().err.splitlines() == [expected]
