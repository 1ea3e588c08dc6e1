"""The same steps under pytest-benchmark: `pytest bench/bench_step.py`, in a checkout.

For its histories and comparisons. Its runs are not interleaved: for ratios use `fusedlr bench`.
"""

from __future__ import annotations

import pytest
import torch

from . import parity
from .providers import PROVIDERS, available
from .shapes import DEFAULT, INVENTORIES

CPU = torch.device("cpu")


def _runnable() -> list[str]:
    return [name for name, why in available(CPU).items() if why is None and not PROVIDERS[name].slow]


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "no-clip"])
@pytest.mark.parametrize("inventory", ["tiny", DEFAULT])
@pytest.mark.parametrize("provider", _runnable())
def test_step(benchmark, provider: str, inventory: str, clip: bool) -> None:
    shapes = INVENTORIES[inventory]
    benchmark.group = f"{shapes.label}, {'clipping' if clip else 'no clipping'}"
    begin = parity.start(shapes, torch.float32, CPU)
    stepper = PROVIDERS[provider].build(begin.parameters(), clip)
    away = parity.gate(stepper, begin, parity.oracle(begin, clip))
    assert away <= parity.bound(shapes, torch.float32)
    benchmark(stepper.step)
