"""`fusedlr info` names what a bug report needs, and fails on nothing that one may be about."""

from __future__ import annotations

import re
import sys

import pytest
import torch

import fusedlr
from fusedlr import backends, cli, info
from fusedlr.backends.gpu import nvrtc, triton


def test_it_names_versions_devices_and_reasons():
    text = info.text()
    assert text.startswith(f"fusedlr {fusedlr.__version__}, Python {sys.version.split()[0]}")
    assert f"torch {torch.__version__}" in text
    device = torch.device("cpu")
    assert f"on cpu: backend {backends.choose('auto', [device]).name}" in text
    for name, why in backends.reasons([device]).items():
        assert (f"  {name}: {why}" in text) == (why is not None)


def test_the_version_of_torch_says_which_build_it_is(monkeypatch):
    # that of a wheel from an index, whose metadata says 2.99.0
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu130")
    assert "torch 2.99.0+cu130" in info.text()
    assert info.installed_version("no-such-package") is None


@pytest.mark.parametrize("name", ["triton", "no such backend"])
def test_a_backend_that_cannot_run_is_reported(name, monkeypatch):
    monkeypatch.setenv("FUSEDLR_BACKEND", name)
    monkeypatch.setattr(triton, "_why_not_on", lambda device: "Triton cannot be imported")
    text = info.text()
    assert f"\nFUSEDLR_BACKEND={name}\n" in text
    assert f"on cpu: no backend: FUSEDLR_BACKEND={name!r} " in text


def test_kernels_are_compiled_counted_and_removed(monkeypatch, tmp_path, capsys):
    if not nvrtc.found():
        pytest.skip("there is no NVRTC")
    monkeypatch.setenv("FUSEDLR_CACHE", str(tmp_path / "kept"))
    assert "compiled kernels: 0 files, 0.0 MiB" in info.text().splitlines()
    assert cli.main(["info", "--compile", "--arch", "sm_90"]) == 0
    assert f"kernels for sm_90, by NVRTC {nvrtc.found()[0]}: ready after" in capsys.readouterr().out
    # for parameters of three types, and launches of two sizes
    assert re.search(r"\ncompiled kernels: 6 files, [1-9.]+ MiB$", info.text())
    assert cli.main(["info", "--clear"]) == 0
    assert "removed 6 files" in capsys.readouterr().out
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "sm_90"], "argument --arch: it says what --compile compiles for"),
        (["--compile", "--arch", "sm_70"], "argument --arch: sm_70 is none of sm_75, "),
        (["--compile", "--arch", "90"], "argument --arch: 90 is none of sm_75, "),
        (["--compile"], "argument --compile: torch sees no NVIDIA GPU here"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_compiled_for_is_named(arguments, words, monkeypatch, capsys):
    if not nvrtc.found():
        pytest.skip("there is no NVRTC")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["info", *arguments])
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_without_nvrtc_compiling_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(nvrtc, "found", lambda: ())
    assert "CUDA kernels are compiled by NVRTC (there is none)" in info.text().splitlines()
    with pytest.raises(SystemExit):
        cli.main(["info", "--compile", "--arch", "sm_90"])
    assert (
        "argument --compile: there is no NVRTC here: pip install nvidia-cuda-nvrtc" in capsys.readouterr().err
    )


def test_it_can_be_pasted(monkeypatch):
    monkeypatch.setenv("FUSEDLR_CACHE", str(cli.ROOT))
    # where the package lies is nobody's business
    assert str(cli.ROOT) not in info.text()


@pytest.mark.parametrize("command", ["demo", "bench", "plot", "info"])
def test_an_unknown_option_is_one_line_that_names_the_command(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--nonsense"])
    assert stopped.value.code == 2
    expected = f"fusedlr {command}: error: unrecognized arguments: --nonsense (fusedlr {command} --help)"
    assert capsys.readouterr().err.splitlines() == [expected]
