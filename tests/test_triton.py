"""What is Triton's alone, in the interpreter: its sum of the norm, what is compiled in, and wrong kernels.

tests/test_gpu_step.py has what a step does.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from triton_spelling import load
from wrong import triton_steps as wrong
from wrong.gpu_runs import rejected

from fusedlr import backends, triton_step
from fusedlr.tables import GROUP_INTS

pytestmark = pytest.mark.interpreter


def test_no_argument_but_a_type_is_compiled_in() -> None:
    from fusedlr import _triton

    for kernel in (_triton.norm_kernel, _triton.step_kernel):
        annotations = kernel.fn.__annotations__
        runtime = [name for name in kernel.arg_names if name not in annotations]
        assert set(annotations) <= {"PARAMS", "MOMENTS", "AMSGRAD"}
        for option in ("do_not_specialize", "do_not_specialize_on_alignment"):
            assert set(kernel.kwargs[option]) == set(runtime)


# --- who can run it


def test_the_interpreter_runs_on_the_cpu_alone() -> None:
    assert backends.reasons([torch.device("cpu")])["triton"] is None
    assert "TRITON_INTERPRET is set" in (triton_step.why_not([torch.device("cuda")]) or "")
    assert "does not run on meta" in (triton_step.why_not([torch.device("meta")]) or "")
    assert "several devices" in (triton_step.why_not([torch.device("cpu"), torch.device("meta")]) or "")


# --- mistakes


@pytest.mark.parametrize("edit", wrong.EDITS)
def test_the_suite_rejects_wrong_steps(edit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedlr import _triton

    copy = load(_triton, tmp_path, wrong.EDITS[edit])
    monkeypatch.setattr(triton_step, "_kernels", lambda: copy)
    assert rejected(), "the suite does not see this mistake"


_SUM_ALONE = """

@triton.jit
def sum_alone(ints, norms, groups):
    finish_norms(ints, norms, groups)
"""


def sums_are_right(folder: Path, edit: tuple[str, str] | None = None) -> bool:
    """Whether the norm's last program adds up the slots of every scope, and no others."""
    from fusedlr import _triton

    copy = load(_triton, folder, edit, _SUM_ALONE)
    sizes = (0, 1, 1023, 1024, 1025, 5000)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    ints = torch.zeros(len(sizes), len(GROUP_INTS), dtype=torch.int64)
    ints[:, GROUP_INTS.index("first_slot")] = torch.tensor([0, *ends[:-1]])
    ints[:, GROUP_INTS.index("last_slot")] = torch.tensor(ends)
    norms = torch.cat([torch.zeros(len(sizes)), torch.rand(ends[-1] + 1)])
    want = [
        norms[len(sizes) :][end - size : end].double().sum().sqrt()
        for size, end in zip(sizes, ends, strict=True)
    ]
    copy.sum_alone[(1,)](ints, norms, len(sizes))
    return torch.allclose(norms[: len(sizes)].double(), torch.stack(want), rtol=1e-6, atol=0)


def test_the_norm_adds_up_every_slot_of_its_scope(tmp_path: Path) -> None:
    assert sums_are_right(tmp_path)


@pytest.mark.parametrize("edit", wrong.SUM_EDITS)
def test_a_wrong_sum_is_seen(edit: str, tmp_path: Path) -> None:
    assert not sums_are_right(tmp_path, wrong.SUM_EDITS[edit])
