"""The CUDA kernels' schedule, as NVRTC compiles it, against the fp64 definition at every step.

The PTX runs on the machine of ptx/. It leaves open the last bits of ex2.approx, lg2.approx and rcp.approx,
of which CUDA's libraries make powf and expm1f: they are taken at both ends of what NVIDIA documents.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from schedule import schedule_parity
from schedule.schedule_zoo import ZOO
from tolerances import CUDA_BIAS_ULPS, CUDA_ROOT_BIAS_ULPS

from gpu import cuda_compile
from gpu.cuda_spelling import Spelling

pytestmark = pytest.mark.skipif(cuda_compile.why_not() is not None, reason=str(cuda_compile.why_not()))

# what approximate instructions return: see Settings in ptx/machine/state.h
APPROXIMATIONS = {"nearest": 0, "up": 1, "down": 2, "by chance": 3}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Spelling:
    return Spelling(tmp_path_factory.mktemp("spelling"))


@pytest.fixture(params=APPROXIMATIONS)
def spelling(request: pytest.FixtureRequest, compiled: Spelling) -> Spelling:
    compiled.approx = APPROXIMATIONS[request.param]
    return compiled


@pytest.mark.parametrize("name", ZOO)
def test_every_step_is_within_the_bounds(name: str, spelling: Spelling) -> None:
    schedule_parity.check(spelling.lr_at, ZOO[name])


_EDITS = {
    "levels swapped": ("cuda/step.cu", "x.from_, x.to, n.shape", "x.to, x.from_, n.shape"),
    "end for origin": ("cuda/step.cu", "n.begin, n.end, n.origin", "n.begin, n.end, n.begin"),
    "head of a parameter alone": ("cuda/step.cu", "x.param_hi + x.param_lo", "x.param_hi"),
    "one phase too few": (
        "cuda/step.cu",
        "ints.last_phase - ints.first_phase, table",
        "ints.last_phase - 1, table",
    ),
    "table from the levels": ("cuda/step.cu", "(levels + step.phases)", "(levels)"),
    "the peak is 1": ("cuda/step.cu", "floats.peak * evaluate", "evaluate"),
    "sine of the whole angle": ("schedule.h", "sinpi(q / n / 2)", "sinpi(q / n)"),
    "32-bit steps": ("schedule.h", "int64_t q = whole * e %", "int64_t q = int32_t(whole * e) %"),
}


@pytest.mark.parametrize("edit", _EDITS)
def test_harness_rejects(edit: str, tmp_path: Path) -> None:
    spelling = Spelling(tmp_path, _EDITS[edit])
    seen = (any(schedule_parity.differences(spelling.lr_at, schedule)) for schedule in ZOO.values())
    assert any(seen), "the harness does not see this mistake"


@cache
def updates() -> NDArray[np.float32]:
    far = np.geomspace(1, 2**24 - 1, 70_000).astype(np.int64)
    return np.concatenate([np.arange(60_000), far]).astype(np.float32)


@pytest.mark.parametrize(
    "b", (0.0, 1e-30, 0.1, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999, 1 - 1e-6, 1 - 1e-9, 1 - 2**-53)
)
def test_bias_correction_from_1_to_2_24(b: float, spelling: Spelling) -> None:
    t = updates().astype(np.float64) + 1
    want = -np.expm1(t * (math.log(b) if b else -math.inf))
    bc1, root_bc2 = spelling.corrections(b, updates())
    assert worst_ulps(bc1, want) <= CUDA_BIAS_ULPS
    assert worst_ulps(root_bc2, np.sqrt(want)) <= CUDA_ROOT_BIAS_ULPS


def worst_ulps(got: NDArray[np.float32], want: NDArray[np.float64]) -> float:
    assert np.isfinite(got).all()
    return float((np.abs(got - want) / np.spacing(want.astype(np.float32)).astype(np.float64)).max())
