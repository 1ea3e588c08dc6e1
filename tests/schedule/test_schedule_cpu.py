"""The C++ schedule against the definition, at every step of the zoo."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import fusedlr
from fusedlr.backends import cpu
from schedule import schedule_parity
from schedule.schedule_zoo import ZOO

if cpu.why_not([torch.device("cpu")]):
    pytest.skip(str(cpu.why_not([torch.device("cpu")])), allow_module_level=True)


@pytest.mark.parametrize("single", (False, True), ids=("fp64", "fp32"))
@pytest.mark.parametrize("name", ZOO)
def test_schedule_agrees_with_the_definition(name, single):
    def evaluator(schedule: fusedlr.Schedule, k: Any, peak: float) -> Any:
        return np.array(cpu.compiled_schedule(schedule.resolve(peak), single).rates(k.tolist(), peak))

    schedule_parity.check(evaluator, ZOO[name], np.float32 if single else np.float64)
