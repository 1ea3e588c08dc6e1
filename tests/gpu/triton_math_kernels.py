"""Kernels that apply one function of fusedlr.backends.gpu.triton_math to many values; needs Triton."""

import triton
import triton.language as tl

from fusedlr.backends.gpu.triton_math import bias_correction, power, sin_quarter


@triton.jit
def sine(x, out, LANES: tl.constexpr):
    i = tl.arange(0, LANES)
    tl.store(out + i, sin_quarter(tl.load(x + i)))


@triton.jit
def bias(t, out, log_hi, log_lo, LANES: tl.constexpr):
    i = tl.arange(0, LANES)
    tl.store(out + i, bias_correction(tl.load(t + i), tl.load(log_hi), tl.load(log_lo)))


@triton.jit
def powers(x, out, c_hi, c_lo, LANES: tl.constexpr):
    i = tl.arange(0, LANES)
    tl.store(out + i, power(tl.load(x + i), tl.load(c_hi), tl.load(c_lo)))
