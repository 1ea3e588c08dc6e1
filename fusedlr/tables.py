"""What a step on a GPU reads from device memory: the columns of its tables, and how host values fill them.

The kernels take every column from here by name. Matrices are row-major, one row per tensor, chunk, group or
phase: the values of a row are used together.
"""

from __future__ import annotations

import math

from fusedlr.schedule import SHAPES, Schedule

# elements per chunk: a program's own part of the traffic, 112 KiB in fp32, is some 30 times what it reads to
# get there, and tensors of a few thousand elements still spread over all processors
CHUNK = 4096

# int64 per tensor: addresses, elements, index of its group
TENSORS = ("param", "exp_avg", "exp_avg_sq", "top", "step", "numel", "group")
# int32 per chunk: its tensor (-1: none), which chunk of the tensor it is, where its partial sum goes (in the
# order of groups and tensors), its group, whether it is the group's first
CHUNKS = ("tensor", "index", "slot", "group", "leads")
# int64 per group: rows of its schedule's phases (none: the rate is given), address of a rate on the device or
# 0, row of the scope whose norm it shares, flags, slots of the scope in that row
GROUP_INTS = (
    "first_phase",
    "last_phase",
    "lr",
    "scope",
    "normed",
    "skip_nonfinite",
    "advance",
    "active",
    "first_slot",
    "last_slot",
)
# fp32 per group: the peak, or the rate itself; betas as the step needs them; sign is -1 to maximize
GROUP_FLOATS = (
    "rate",
    "log_b1_hi",
    "log_b1_lo",
    "log_b2_hi",
    "log_b2_lo",
    "one_b1",
    "b2",
    "one_b2",
    "eps",
    "weight_decay",
    "max_grad_norm",
    "sign",
)
# int64 per phase; `whole` is restarts, whole half waves, or the position in the table
PHASE_INTS = ("begin", "end", "origin", "shape", "whole")
# fp32 per phase; the parts of `param` add up to the power, the time scale or the rest of a half wave
PHASE_FLOATS = ("from_", "to", "param_hi", "param_lo")


def split(x: float) -> tuple[float, float]:
    """`x` as 12 bits and the rest: products of 12-bit numbers are exact in fp32."""
    mantissa, exponent = math.frexp(x)
    high = math.ldexp(round(math.ldexp(mantissa, 12)), exponent - 12)
    return high, x - high


def log(b: float) -> float:
    """log(b); for 0 a number whose multiples are finite and whose power is 0."""
    return math.log(b) if b > 0 else -128.0


def pack_phases(schedule: Schedule, position: int) -> tuple[list[int], list[float]]:
    """The rows of a schedule's phases, if its table begins at `position`."""
    ints: list[int] = []
    floats: list[float] = []
    for phase in schedule.phases:
        whole, param = 0, phase.shape_param
        if phase.shape == "cosine":
            whole = int(2 * param)
            param = 2 * param - whole
        elif phase.shape == "restarts":
            whole = int(param)
        elif phase.shape == "table":
            whole = position + int(param)
        ints += [phase.begin, phase.end, phase.origin, SHAPES.index(phase.shape), whole]
        floats += [phase.from_, phase.to, *split(param)]  # type: ignore[list-item]
    return ints, floats
