"""The scalar functions of the Triton kernels against fp64, in the interpreter.

They use IEEE operations alone, so a GPU gives the same bits.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tolerances import TRITON_BIAS_ULPS, TRITON_POWER_ULPS, TRITON_SINE_ULPS

from fusedlr.backends.gpu.tables import log, split

pytestmark = pytest.mark.interpreter

# values per call
_LANES = 2**17


def apply(name: str, x: NDArray[np.float32], *scalars: float) -> NDArray[np.float64]:
    """A function of fusedlr._triton_math on many values."""
    from gpu import triton_math_kernels as kernels

    x = np.resize(x, _LANES)
    out = torch.empty(_LANES)
    numbers = [torch.tensor([value]) for value in scalars]
    getattr(kernels, name)[(1,)](torch.from_numpy(x), out, *numbers, LANES=_LANES)
    return out.numpy().astype(np.float64)


def worst_ulps(got: NDArray[np.float64], want: NDArray[np.float64]) -> float:
    ulp = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
    # below the smallest normal number a result may be flushed to 0
    error = np.where(
        want < np.finfo(np.float32).tiny, np.minimum(got, np.abs(got - want)), np.abs(got - want)
    )
    assert np.isfinite(got).all()
    return float((error / ulp).max())


def test_sine() -> None:
    x = np.concatenate([np.linspace(0, 0.5, _LANES // 2), np.geomspace(1e-12, 0.5, _LANES // 2)]).astype(
        np.float32
    )
    got = apply("sine", x)
    assert worst_ulps(got, np.sin(np.pi / 2 * x.astype(np.float64))) <= TRITON_SINE_ULPS
    assert got[0] == 0


@pytest.mark.parametrize(
    "b", (0.0, 1e-30, 0.1, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999, 1 - 1e-6, 1 - 1e-9, 1 - 2**-53)
)
def test_bias_correction_from_1_to_1e7(b: float) -> None:
    far = np.geomspace(1, 2**24, _LANES - 60_000).astype(np.int64)
    t = np.concatenate([np.arange(1, 60_001), far]).astype(np.float32)
    got = apply("bias", t, *split(log(b)))
    want = -np.expm1(t.astype(np.float64) * (math.log(b) if b else -math.inf))
    assert worst_ulps(got, want) <= TRITON_BIAS_ULPS


@pytest.mark.parametrize("c", (1e-3, 0.5, 0.9, 1.0, 1.5, 2.0, 3.0, math.pi, 12.5, 40.0, 100.7))
def test_power(c: float) -> None:
    n = _LANES // 4
    near_1 = 1 - np.geomspace(1e-7, 1, n)
    x = np.concatenate([np.linspace(0, 1, 2 * n), near_1, np.geomspace(1e-9, 1, n)]).astype(np.float32)
    got = apply("powers", x, *split(c))
    assert worst_ulps(got, x.astype(np.float64) ** c) <= TRITON_POWER_ULPS
    assert (got[x == 0] == 0).all() and (got[x == 1] == 1).all()


@pytest.mark.parametrize("x", (math.pi, -math.log(0.999), 1e-300, -128.0, 1.0, 0.0))
def test_split_is_exact_and_its_head_short(x: float) -> None:
    high, low = split(x)
    assert high + low == x
    assert high == 0 or math.frexp(high)[0] * 4096 % 1 == 0
