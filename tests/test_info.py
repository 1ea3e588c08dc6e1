"""`fusedlr info` names what a bug report needs, and fails on nothing that one may be about."""

from __future__ import annotations

import sys

import pytest
import torch

import fusedlr
from fusedlr import backends, cli


def test_it_names_versions_devices_and_reasons() -> None:
    text = cli.info()
    assert text.startswith(f"fusedlr {fusedlr.__version__}, Python {sys.version.split()[0]}")
    assert f"torch {torch.__version__}" in text
    device = torch.device("cpu")
    assert f"on cpu: backend {backends.choose('auto', [device]).name}" in text
    for name, why in backends.reasons([device]).items():
        assert (f"  {name}: {why}" in text) == (why is not None)


@pytest.mark.parametrize("name", ["cuda", "no such backend"])
def test_a_backend_that_cannot_run_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDLR_BACKEND", name)
    text = cli.info()
    assert f"\nFUSEDLR_BACKEND={name}\n" in text
    assert f"on cpu: no backend: FUSEDLR_BACKEND={name!r} " in text


def test_it_can_be_pasted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDLR_CACHE", str(cli.ROOT))
    # where the package lies is nobody's business
    assert str(cli.ROOT) not in cli.info()


@pytest.mark.parametrize("command", ["demo", "bench", "plot", "info"])
def test_an_unknown_option_is_one_line_that_names_the_command(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--nonsense"])
    assert stopped.value.code == 2
    expected = f"fusedlr {command}: error: unrecognized arguments: --nonsense (fusedlr {command} --help)"
    assert capsys.readouterr().err.splitlines() == [expected]
