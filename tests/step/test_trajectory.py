"""Whole runs: torch in fp64 <= reference <= every backend, and what rounding costs in fp32, bf16 and fp16."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from cases import CASES, FALLING, UNIFORM, Case
from harness import Run, brief, fused, make_groups, relative_difference, run, squared_error, stock
from tolerances import FP64_TRAJECTORY, MOMENTS_RATIO, RMS_RATIO, WRONG_MARGIN
from wrong import steps as wrong_steps

import fusedlr
from fusedlr import backends

MOMENTS = ("exp_avg", "exp_avg_sq")

THOUSAND = replace(UNIFORM[0], steps=1000, schedule=fusedlr.cosine(warmup_steps=100, total_steps=1000))
# with an epsilon that 16 bits can hold
UNIFORM_16 = tuple(replace(case, options={**case.options, "eps": 1e-4}) for case in UNIFORM)
# a few steps show every mistake but the one that needs gradients to go away
FEW = tuple(replace(case, steps=12) for case in CASES)


def distance(a: Run, b: Run) -> float:
    """Largest relative difference over parameters and moments."""
    keys = (*MOMENTS, *(["max_exp_avg_sq"] if a.optimizer.defaults["amsgrad"] else []))
    return max(
        relative_difference(a.params, b.params),
        *(relative_difference(a.state(key), b.state(key)) for key in keys),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fp64_equals_torch(case, device, backend):
    ours = run(case, fused(case, backend=backend), device=device)
    theirs = run(case, stock(case), device=device)
    assert distance(ours, theirs) <= FP64_TRAJECTORY
    for p in ours.params:
        assert ours.optimizer.state[p]["step"].device == p.device
    steps = [[s.item() for s in r.state("step")] for r in (ours, theirs)]
    assert steps[0] == steps[1]


def test_fp32_error_is_at_most_that_of_torch(device, backend):
    assert rms_ratio(UNIFORM, torch.float32, device, backend) <= RMS_RATIO


def test_error_over_a_thousand_steps_is_at_most_that_of_torch_fused(device, backend):
    totals = errors(THOUSAND, torch.float32, device, backend, kernel=True)
    assert (totals[0] / totals[1]) ** 0.5 <= RMS_RATIO


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_16_bit_moments_are_as_good_as_those_of_torch_fused(dtype, device, backend):
    # where fp16 overflows or its moments underflow to 0, torch gives nan: there is nothing to compare with
    cases = [case for case in UNIFORM_16 if dtype == torch.bfloat16 or case.grad_size(0) == 1]
    assert rms_ratio(cases, dtype, device, backend, state_dtype="param") <= RMS_RATIO


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_16_bit_moments_are_those_of_torch_fused(dtype, device, backend):
    # one update from the same state: the same roundings, but for a last bit where operations are ordered
    # differently
    case = replace(FALLING, steps=1)
    ours = run(case, fused(case, backend=backend, state_dtype="param"), dtype=dtype, device=device)
    theirs = run(case, stock(case, fused=True), dtype=dtype, device=device)
    for key in MOMENTS:
        for a, b in zip(ours.state(key), theirs.state(key), strict=True):
            assert a.dtype == b.dtype == dtype
            assert ulps(a, b) <= 1


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_fp32_moments_are_closer_to_the_oracle_than_torch(dtype, device, backend):
    # all of its steps, whoever runs them
    totals = errors(FALLING, dtype, device, backend)
    assert (totals[0] / totals[1]) ** 0.5 < MOMENTS_RATIO


@pytest.mark.parametrize("case", UNIFORM, ids=lambda case: case.name)
def test_two_runs_give_the_same_bits(case, device, backend):
    case = brief(replace(case, steps=min(case.steps, 10)), device, backend)
    first, second = (
        run(case, fused(case, backend=backend), dtype=torch.float32, device=device) for _ in range(2)
    )
    for key in MOMENTS:
        assert all(map(torch.equal, first.state(key), second.state(key)))
    assert all(map(torch.equal, first.params, second.params))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_rate_and_decay_of_zero_leave_the_bits_alone(dtype, device, backend):
    case = replace(UNIFORM[0], lr=0.0, options={"weight_decay": 0.0}, steps=5, schedule=fusedlr.constant())
    ours = run(case, fused(case, backend=backend), dtype=dtype, device=device)
    start = [p for group in make_groups(case, dtype, dtype, device) for p in group["params"]]
    assert all(map(torch.equal, ours.params, start))


@pytest.mark.parametrize("name", wrong_steps.EDITS)
def test_the_suite_rejects_wrong_steps(name, monkeypatch):
    wrong = wrong_steps.load(name)
    entry = replace(backends.BACKENDS["reference"], prepare=wrong.ReferenceStepper)
    monkeypatch.setitem(backends.BACKENDS, "reference", entry)
    missed = (
        distance(run(case, fused(case, backend="reference")), expected(case, torch.float64, "cpu"))
        for case in FEW
    )
    assert any(worst > WRONG_MARGIN * FP64_TRAJECTORY for worst in missed)


# the runs of the oracle and of torch are the same for every backend and every mistake
@cache
def oracle(case: Case, start: torch.dtype, device: str) -> Run:
    return run(case, fused(case, backend="reference"), start=start, device=device)


@cache
def expected(case: Case, dtype: torch.dtype, device: str, **options: bool) -> Run:
    return run(case, stock(case, **options), dtype=dtype, device=device)


def errors(
    case: Case, dtype: torch.dtype, device: str, backend: str, kernel: bool = False, **options: object
) -> tuple[float, float]:
    """Squared error of the parameters against the fp64 oracle: (ours, torch's).

    Torch's is that of its fused step if asked for by `kernel`, and for 16 bits.
    """
    exact = oracle(case, dtype, device)
    ours = run(case, fused(case, backend=backend, **options), dtype=dtype, device=device)
    theirs = expected(case, dtype, device, fused=kernel or dtype != torch.float32)
    return squared_error(ours.params, exact.params), squared_error(theirs.params, exact.params)


def rms_ratio(
    cases: list[Case] | tuple[Case, ...], dtype: torch.dtype, device: str, backend: str, **options: object
) -> float:
    """RMS error of ours over torch's, over all elements of all cases."""
    cases = [brief(case, device, backend) for case in cases]
    totals = [errors(case, dtype, device, backend, **options) for case in cases]
    ours, theirs = (sum(column) for column in zip(*totals, strict=True))
    return (ours / theirs) ** 0.5


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in units of the last place between tensors of the same 16-bit dtype."""

    def ordered(x: torch.Tensor) -> torch.Tensor:
        bits = x.cpu().view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((ordered(a) - ordered(b)).abs().max()) if a.numel() else 0
