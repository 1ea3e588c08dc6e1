"""Scalar functions of the Triton kernels in fp32: IEEE operations and integers alone, so that every device
and the interpreter give the same bits, and nothing calls a slow path, a library or fp64.

Errors hold with FP contraction off (`enable_fp_fusion=False`); tests/gpu/test_triton_math.py measures them.
"""

import math

import triton
import triton.language as tl

# Taylor coefficients of sin(pi/2*x) / x in x**2; at x = 1/2 the first one left out is 2e-9 of it
_S0 = tl.constexpr(math.pi / 2)
_S1 = tl.constexpr(-((math.pi / 2) ** 3) / math.factorial(3))
_S2 = tl.constexpr((math.pi / 2) ** 5 / math.factorial(5))
_S3 = tl.constexpr(-((math.pi / 2) ** 7) / math.factorial(7))
_S4 = tl.constexpr((math.pi / 2) ** 9 / math.factorial(9))

_LN2 = tl.constexpr(math.log(2))
_LOG2_E = tl.constexpr(1 / math.log(2))
# 12 bits, so that its product with a small integer is exact, and the rest
_LN2_HI = tl.constexpr(2839 / 4096)
_LN2_LO = tl.constexpr(math.log(2) - 2839 / 4096)

# 2/ln(2), which turns atanh(s) into log2((1+s)/(1-s)); 12 bits and the rest
_L = tl.constexpr(2 / math.log(2))
_L_HI = tl.constexpr(2954 / 1024)
_L_LO = tl.constexpr(2 / math.log(2) - 2954 / 1024)
# atanh(s) = s + s**3/3 + ...; |s| <= 3 - 2*sqrt(2), where s**11/11 is 2e-9 of s and s**13/13 4e-11
_L1 = tl.constexpr(2 / math.log(2) / 3)
_L2 = tl.constexpr(2 / math.log(2) / 5)
_L3 = tl.constexpr(2 / math.log(2) / 7)
_L4 = tl.constexpr(2 / math.log(2) / 9)
_L5 = tl.constexpr(2 / math.log(2) / 11)
# bits of sqrt(1/2)
_ROOT_HALF = tl.constexpr(0x3F3504F3)


@triton.jit
def sin_quarter(x):
    """sin(pi/2 * x) for 0 <= x <= 1/2: up to 1 the sum would lose two bits."""
    s = x * x
    return x * (_S0 + s * (_S1 + s * (_S2 + s * (_S3 + s * _S4))))


@triton.jit
def expm1_small(x):
    """exp(x) - 1 for |x| <= ln(2)/2, by Taylor: the term left out, x**9/9!, is 6e-10 of x."""
    tail = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))
    return x + x * x * (0.5 + x * (1 / 6 + x * tail))


@triton.jit
def power_of_2(n):
    """2**n for a whole fp32 number -127 <= n <= 127; 0 at -127."""
    return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def leading(x):
    """The leading 12 of 24 bits of x: the product of two such numbers is exact."""
    return (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def bias_correction(t, log_hi, log_lo):
    """1 - b**t for whole t >= 1: log(b) is the 12 bits of `log_hi` plus `log_lo`."""
    # both products are exact
    t_hi = tl.floor(t * (1 / 4096)) * 4096.0
    a = t_hi * log_hi
    b = (t - t_hi) * log_hi
    # b**t is 0 in fp32 long before; a finite number where b is 0 or t large
    x = tl.maximum(a + b, -64.0)
    rest = tl.where(a + b < -64.0, 0.0, b - ((a + b) - a) + t * log_lo)
    # exp(x) = 2**n * exp(r)
    n = tl.floor(x * _LOG2_E + 0.5)
    r = (x - n * _LN2_HI) + (rest - n * _LN2_LO)
    scale = power_of_2(n)
    return (1.0 - scale) - scale * expm1_small(r)


@triton.jit
def power(x, c_hi, c_lo):
    """x**c for 0 <= x <= 1 and c > 0: c is the 12 bits of `c_hi` plus `c_lo`.

    An exponent of up to 126 must be known to 2**-24 or better, so its parts are kept apart.
    """
    # x = m * 2**n with sqrt(1/2) <= m < sqrt(2)
    bits = x.to(tl.int32, bitcast=True)
    shift = (bits - _ROOT_HALF) >> 23
    m = (bits - (shift << 23)).to(tl.float32, bitcast=True)
    n = shift.to(tl.float32)
    # s = (m-1)/(m+1) to twice the precision: s_hi + s_lo
    d = m + 1.0
    d_hi = leading(d)
    s = tl.div_rn(m - 1.0, d)
    s_hi = leading(s)
    left = (((m - 1.0) - s_hi * d_hi) - s_hi * (d - d_hi)) - s_hi * (m - (d - 1.0))
    s_lo = tl.div_rn(left, d)
    # log2(x) = n + log2(m), as whole + part with 12 bits in whole
    q = s * s
    series = s * q * (_L1 + q * (_L2 + q * (_L3 + q * (_L4 + q * _L5))))
    a = s_hi * _L_HI
    total = n + a
    whole = leading(total)
    part = (total - whole) + (((n - total) + a) + (s_hi * _L_LO + s_lo * _L + series))
    # c * log2(x) = y + z, y exact
    y = c_hi * whole
    z = c_lo * whole + (c_hi + c_lo) * part
    n = tl.maximum(tl.floor(y + z + 0.5), -127.0)
    scale = power_of_2(n)
    value = scale + scale * expm1_small(((y - n) + z) * _LN2)
    return tl.where(x > 0.0, value, 0.0)
