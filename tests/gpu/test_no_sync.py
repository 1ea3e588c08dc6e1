"""The step never reads a tensor on the host: shown without a GPU, and that the checks can tell."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from wrong import steps as wrong_steps

import fusedlr
from fusedlr import backends, reference
from fusedlr.backends.order import StepInputs
from fusedlr.kept import Kept
from fusedlr.record import Ring

# bench is run from the checkout; where only the tests are, there is no bench to test
ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
gpu_suite = pytest.importorskip("bench.gpu_suite")
from bench import syncs  # noqa: E402

SCHEDULES = [
    fusedlr.constant(),
    fusedlr.cosine(warmup_steps=2, total_steps=10),
    fusedlr.cosine(total_steps=10, num_cycles=0.7),
    fusedlr.cosine_with_restarts(warmup_steps=2, total_steps=10, num_cycles=2),
    fusedlr.polynomial(total_steps=10, power=2.0).resolve(1.0),
    fusedlr.inverse_sqrt(warmup_steps=2),
    fusedlr.warmup_stable_decay(3, 3, 10, warmup_type="1-sqrt", decay_type="1-sqrt"),
]


def meta_step(
    make: Callable[..., Any],
    schedule: fusedlr.Schedule,
    amsgrad: bool = False,
    clip: float | None = 1.0,
    record: fusedlr.Record | None = None,
) -> None:
    """One step on tensors that have no values: whatever looks at one raises."""

    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    rows = []
    for _ in range(2):
        p = torch.nn.Parameter(tensor(4, 3))
        p.grad = tensor(4, 3)
        names = Kept().names(p, {"amsgrad": amsgrad})
        rows.append(reference.Row.alone(0, p, {name: tensor(4, 3) for name in names}, tensor()))
    group = reference.GroupStep(
        schedule=schedule,
        lr=None,
        peak=1.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.1,
        maximize=True,
        scope=0,
    )
    counters = reference.Counters.zeros(1, torch.device("meta"))
    if record is not None:
        ring = Ring.empty(record, 1, torch.device("meta"), counters.used.dtype)
        counters.ring = ring.of_params([row.owner for row in rows])
    stepper = make(rows, counters, StepInputs(rows, [0.1]))
    stepper.assign([group], [reference.Scope(clip, skip_nonfinite=True, always=True)])
    stepper.step(reference.Signals(grad_scale=tensor(1), found_inf=tensor(1)))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(
    "options", ({}, {"amsgrad": True}, {"clip": None}, {"record": fusedlr.Record()}), ids=repr
)
def test_reference_step_runs_without_values(schedule: fusedlr.Schedule, options: dict[str, Any]) -> None:
    meta_step(reference.ReferenceStepper, schedule, **options)


def test_a_syncing_step_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = wrong_steps.load("host decides to skip", wrong_steps.SYNCS)
    with pytest.raises(RuntimeError, match="meta"):
        meta_step(wrong.ReferenceStepper, fusedlr.constant())
    entry = replace(backends.BACKENDS["reference"], prepare=wrong.ReferenceStepper)
    monkeypatch.setitem(backends.BACKENDS, "reference", entry)
    found = gpu_suite.look_for_syncs("reference", "cpu", steps=2)
    assert not found["passed"]
    assert found["forbidden events"] == {"aten::_local_scalar_dense": 2}


@pytest.mark.gpu
def test_a_syncing_step_is_caught_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = wrong_steps.load("host decides to skip", wrong_steps.SYNCS)
    entry = replace(backends.BACKENDS["reference"], prepare=wrong.ReferenceStepper)
    monkeypatch.setitem(backends.BACKENDS, "reference", entry)
    found = gpu_suite.look_for_syncs("reference", "cuda", steps=2)
    assert not found["passed"]
    assert found["debug mode"] is not None
    assert any(name.startswith("Memcpy DtoH") for name in found["forbidden events"])


def test_what_counts_as_a_sync() -> None:
    queued = [
        "cudaLaunchKernel",
        "cudaMemcpyAsync",
        "Memcpy HtoD (Pinned -> Device)",
        "cudaEventRecord",
        "aten::add_",
    ]
    waits = [
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaMemcpy",
        "cuMemcpyDtoH_v2",
        "cudaEventSynchronize",
    ]
    copies = [
        "Memcpy DtoH (Device -> Pinned)",
        "Memcpy DtoH (Device -> Pageable)",
        "aten::_local_scalar_dense",
    ]
    assert not syncs.forbidden(queued)
    assert set(syncs.forbidden(queued + waits + copies)) == {*waits, *copies}
