"""The learning rate schedule in Triton: fusedlr/schedule/phases.py under the same names, spelled only here.

fp32 with steps reduced as int64 (csrc/schedule.h with R = float is the same); the kernels call `lr_at` once
per program. A schedule is read from device memory in the columns of fusedlr/columns.py.
"""

import triton
import triton.language as tl

from fusedlr import schedule as definition
from fusedlr.backends.gpu.triton_math import power, sin_quarter
from fusedlr.columns import PHASE_FLOATS as _PHASE_FLOATS
from fusedlr.columns import PHASE_INTS as _PHASE_INTS

PHASE_INTS = tl.constexpr(len(_PHASE_INTS))
BEGIN = tl.constexpr(_PHASE_INTS.index("begin"))
END = tl.constexpr(_PHASE_INTS.index("end"))
ORIGIN = tl.constexpr(_PHASE_INTS.index("origin"))
SHAPE = tl.constexpr(_PHASE_INTS.index("shape"))
WHOLE = tl.constexpr(_PHASE_INTS.index("whole"))

PHASE_FLOATS = tl.constexpr(len(_PHASE_FLOATS))
FROM = tl.constexpr(_PHASE_FLOATS.index("from_"))
TO = tl.constexpr(_PHASE_FLOATS.index("to"))
PARAM_HI = tl.constexpr(_PHASE_FLOATS.index("param_hi"))
PARAM_LO = tl.constexpr(_PHASE_FLOATS.index("param_lo"))

LINEAR = tl.constexpr(definition.SHAPES.index("linear"))
COSINE = tl.constexpr(definition.SHAPES.index("cosine"))
RESTARTS = tl.constexpr(definition.SHAPES.index("restarts"))
POLYNOMIAL = tl.constexpr(definition.SHAPES.index("polynomial"))
INVERSE_SQRT = tl.constexpr(definition.SHAPES.index("inverse_sqrt"))
ONE_MINUS_SQRT = tl.constexpr(definition.SHAPES.index("1-sqrt"))
ONE_MINUS_SQRT_RISE = tl.constexpr(definition.SHAPES.index("1-sqrt-rise"))
TABLE = tl.constexpr(definition.SHAPES.index("table"))


@triton.jit
def real(x):
    """A step or count in the precision of the arithmetic."""
    return x.to(tl.float32)


@triton.jit
def cosine_angle(shape, whole, part, e, n):
    """Where the wave stands after e of n steps: (from the crest, from the trough), 0 to 1 a half wave.

    `whole + part` half waves, or `whole` restarts.
    """
    if shape == RESTARTS:
        q = whole * e % n
        crest = tl.div_rn(real(q), real(n))
        trough = tl.div_rn(real(n - q), real(n))
    else:
        # 0.5*(1 - cos(pi*x)) = sin(pi/2 * x)**2 has period 2 in x = q/n and is even around x = 1
        q = whole * e % (2 * n)
        if part == 0:
            q = tl.where(q > n, 2 * n - q, q)
            crest = tl.div_rn(real(q), real(n))
            trough = tl.div_rn(real(n - q), real(n))
        else:
            # the rest of a half wave is not whole, but small: it rounds little
            q = tl.where(q > n, q - 2 * n, q)
            x = tl.abs(tl.div_rn(real(q), real(n)) + part * tl.div_rn(real(e), real(n)))
            crest = tl.where(x > 1, 2.0 - x, x)
            trough = 1.0 - crest
    return crest, trough


@triton.jit
def phase_weights(shape, whole, param_hi, param_lo, e, n, table):
    """Weights of `from_` and `to` after e of the phase's n steps."""
    c = param_hi + param_lo
    r = n - e
    elapsed = tl.div_rn(real(e), real(n))
    remaining = tl.div_rn(real(r), real(n))
    # constant
    w0 = elapsed * 0.0 + 1.0
    w1 = elapsed * 0.0
    if shape == LINEAR:
        w0 = remaining
        w1 = elapsed
    elif (shape == COSINE) | (shape == RESTARTS):
        crest, trough = cosine_angle(shape, whole, c, e, n)
        # the smaller weight is computed as itself; the other one is at least 1/2
        near = sin_quarter(tl.minimum(crest, trough))
        near = near * near
        w0 = tl.where(crest < trough, 1.0 - near, near)
        w1 = tl.where(crest < trough, near, 1.0 - near)
    elif shape == POLYNOMIAL:
        w0 = power(remaining, param_hi, param_lo)
        w1 = 1.0 - w0
    elif shape == INVERSE_SQRT:
        w0 = tl.div_rn(1.0, tl.sqrt_rn(1.0 + tl.div_rn(real(e), c)))
        w1 = 1.0 - w0
    elif shape == ONE_MINUS_SQRT:
        w1 = tl.sqrt_rn(elapsed)
        w0 = tl.div_rn(remaining, 1.0 + w1)
    elif shape == ONE_MINUS_SQRT_RISE:
        w0 = tl.sqrt_rn(remaining)
        w1 = tl.div_rn(elapsed, 1.0 + w0)
    elif shape == TABLE:
        w1 = tl.load(table + whole + e)
        w0 = 1.0 - w1
    return w0, w1


@triton.jit
def level(ints, floats, table, k):
    """The ratio of the peak that one phase, a row of each matrix, gives at step k."""
    origin = tl.load(ints + ORIGIN)
    end = tl.load(ints + END)
    e = tl.minimum(tl.maximum(k, tl.load(ints + BEGIN)), end) - origin
    w0, w1 = phase_weights(
        tl.load(ints + SHAPE),
        tl.load(ints + WHOLE),
        tl.load(floats + PARAM_HI),
        tl.load(floats + PARAM_LO),
        e,
        end - origin,
        table,
    )
    return tl.load(floats + FROM) * w0 + tl.load(floats + TO) * w1


@triton.jit
def evaluate(ints, floats, table, first, last, k):
    """The ratio of the peak at step k of the schedule in rows first ... last-1: the last phase begun."""
    i = first
    j = first + 1
    # no `for`: the interpreter of Triton 3.6 cannot run one over a tensor with numpy 2.4
    while j < last:
        i = tl.where(k >= tl.load(ints + j * PHASE_INTS + BEGIN), j, i)
        j += 1
    return level(ints + i * PHASE_INTS, floats + i * PHASE_FLOATS, table, k)
