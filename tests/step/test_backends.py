"""Which backend runs, and what is said where the one asked for cannot or none is fast."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from kit import make, needs_watch, prepare_anew, scheduled, set_grads, steps
from snapshots import unchanged

import fusedlr
from fusedlr.backends import compiled
from fusedlr.backends.gpu import cuda, triton

GPU = {"cuda": cuda, "triton": triton}


@pytest.mark.parametrize("name", GPU)
def test_a_backend_asked_for_that_cannot_run_says_why(name, monkeypatch):
    # on the machine of ptx/ it could
    why = "it is not for this test"
    monkeypatch.setattr(GPU[name], "_why_not_on", lambda device: why)
    with pytest.raises(RuntimeError, match=re.escape(f"backend={name!r} cannot run here: {why}")):
        make(backend=name)
    monkeypatch.setenv("FUSEDLR_BACKEND", name)
    with pytest.raises(RuntimeError, match=re.escape(f"FUSEDLR_BACKEND={name!r} cannot run here: {why}")):
        make()


def test_the_environment_overrides_the_backend(monkeypatch, recwarn):
    monkeypatch.setenv("FUSEDLR_BACKEND", "reference")
    optimizer = make()
    assert optimizer.backend == "reference"
    assert "backend=reference" in repr(optimizer)
    steps(optimizer, 0, 1)
    # it was asked for: that it is slow is no surprise
    assert not [w for w in recwarn if issubclass(w.category, fusedlr.FallbackWarning)]


def test_an_unknown_backend_in_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("FUSEDLR_BACKEND", "opencl")
    with pytest.raises(ValueError, match="FUSEDLR_BACKEND='opencl' is unknown, expected one of auto"):
        make()


def test_a_backend_that_stops_running_changes_nothing(monkeypatch):
    optimizer = scheduled()
    steps(optimizer, 0, 2)
    set_grads(optimizer)
    monkeypatch.setenv("FUSEDLR_BACKEND", "opencl")
    # a step like the last one runs where that did
    prepare_anew(optimizer)
    with unchanged(optimizer), pytest.raises(ValueError, match="opencl"):
        optimizer.step()


def test_falling_back_is_said_once_with_the_reasons(monkeypatch):
    for module in GPU.values():
        monkeypatch.setattr(module, "_why_not_on", lambda device: "it is not for this test")
    # as on a machine without a compiler
    monkeypatch.setattr(compiled, "cpu", None)
    monkeypatch.setattr(compiled, "cpu_error", "the C++ kernel was not built")
    optimizer = make()
    assert optimizer.backend == "reference"
    with pytest.warns(fusedlr.FallbackWarning) as caught:
        set_grads(optimizer)
        for _ in range(3):
            optimizer.step()
    (warning,) = [w for w in caught if issubclass(w.category, fusedlr.FallbackWarning)]
    assert all(f"{name}: " in str(warning.message) for name in ("cpu", "cuda", "triton"))
    assert warning.filename == __file__


def test_an_optimizer_that_trains_nothing_runs_where_nothing_is_built(monkeypatch):
    monkeypatch.setattr(compiled, "cpu", None)
    monkeypatch.setattr(compiled, "cpu_error", "the C++ kernel was not built")
    optimizer = make()
    optimizer.param_groups[0]["params"].clear()
    assert optimizer.backend == "reference"
    optimizer.step()


@needs_watch
def test_a_torch_that_does_not_describe_its_tensors_makes_the_same_steps():
    # a process of its own, because the watch asks torch once
    code = """
import torch
del torch.Tensor.__dlpack_c_exchange_api__
import fusedlr
params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
ours, stock = fusedlr.FusedAdamW(params[:1], lr=0.1), torch.optim.AdamW(params[1:], lr=0.1)
for optimizer, p in zip((ours, stock), params):
    for k in range(3):
        p.grad = torch.full((3,), 1.0 + k)
        optimizer.step()
torch.testing.assert_close(*params)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
