"""What is the Triton backend's alone: what is compiled in, and where it runs."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fusedlr import backends
from fusedlr.backends.gpu import triton
from gpu.steps import compare, params, train


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_no_argument_but_a_type_is_compiled_in() -> None:
    from fusedlr.backends.gpu import triton_kernels

    for kernel in (triton_kernels.norm_kernel, triton_kernels.step_kernel):
        compiled_in = {p.name for p in kernel.params if p.is_constexpr}
        assert compiled_in <= {"PARAMS", "MOMENTS", "AMSGRAD", "MASTER", "RECORD"}
        for p in kernel.params:
            assert p.is_constexpr or (p.do_not_specialize and p.do_not_specialize_on_alignment), p.name


@pytest.mark.interpreter
def test_the_interpreter_runs_on_the_cpu_alone() -> None:
    assert backends.reasons([torch.device("cpu")])["triton"] is None
    assert "TRITON_INTERPRET is set" in (triton.why_not([torch.device("cuda")]) or "")
    assert "does not run on meta" in (triton.why_not([torch.device("meta")]) or "")
    assert "several devices" in (triton.why_not([torch.device("cpu"), torch.device("meta")]) or "")


@pytest.mark.interpreter
def test_a_step_in_the_interpreter() -> None:
    def make() -> list[dict]:
        groups = [{"params": params(5, 1030)}, {"params": params(3, dtype=torch.bfloat16), "amsgrad": True}]
        return groups

    compare(train("triton", make, groups="independent"), train("reference", make, groups="independent"))
