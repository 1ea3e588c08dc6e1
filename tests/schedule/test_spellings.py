"""Every spelling of the schedule in Python against the definition: fp32 in numpy, fp64 on torch's tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from wrong import schedules as wrong

from fusedlr import Schedule
from fusedlr.reference import TensorMath
from fusedlr.schedule import evaluate
from schedule import schedule_numpy, schedule_parity
from schedule.schedule_zoo import PEAK, ZOO


@pytest.mark.parametrize("name", ZOO)
def test_fp32_is_enough(name: str) -> None:
    schedule_parity.check(schedule_numpy.lr_at, ZOO[name])


@pytest.mark.parametrize("edit", wrong.EDITS)
def test_harness_rejects(edit: str) -> None:
    spelling = wrong.load(edit).lr_at
    rejected = [any(schedule_parity.differences(spelling, schedule)) for schedule in ZOO.values()]
    assert any(rejected), "the harness does not see this mistake"
    # every mistake leaves some schedule right: a harness that rejects all of them is wrong itself
    assert not all(rejected)


class Vectors(TensorMath):
    """The reference's arithmetic over many steps at once."""

    def take(self, values: Any, index: torch.Tensor) -> torch.Tensor:
        return torch.tensor(values, dtype=self.dtype, device=self.device)[index]


def on_device(xp: TensorMath) -> schedule_parity.Evaluator:
    """The evaluator of the reference step."""

    def lr_at(schedule: Schedule, k: np.ndarray, peak: float) -> np.ndarray:
        schedule = schedule.resolve(peak)
        values = []
        # 1024 steps take one thread: MKL's first sine on two may be 7e-9 off (torch 2.13, 1 process in 200)
        for steps in torch.from_numpy(k).to(xp.device).split(1024):
            ratio = evaluate(schedule.phases, steps, schedule.table, xp)
            # a constant does not depend on the step: `evaluate` returns one number for it
            ratio = ratio if isinstance(ratio, torch.Tensor) else xp.scalar(ratio)
            values.append((peak * ratio).cpu().expand(steps.shape))
        return torch.cat(values).numpy()

    return lr_at


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_reference_evaluates_on_the_device(device: str) -> None:
    for schedule in ZOO.values():
        schedule_parity.check(on_device(Vectors(torch.device(device))), schedule, np.float64)


@pytest.mark.parametrize("name", ZOO)
def test_reference_evaluates_one_counter(name: str) -> None:
    schedule = ZOO[name].resolve(PEAK)
    xp = TensorMath(torch.device("cpu"))
    for k in {0, 1, schedule.phases[-1].begin, schedule.phases[-1].end - 1, 10**9}:
        got = xp.scalar(evaluate(schedule.phases, torch.tensor(k), schedule.table, xp))
        want = schedule.lr_at(k)
        assert got.shape == () and got.dtype == torch.float64
        assert abs(got.item() - want) <= tolerances.SCHEDULE_ULPS_FP64 * math.ulp(want)
