"""What a step on a GPU reads from device memory: the columns of its tables, and how host values fill them.

The kernels take every column from here by name. Matrices are row-major, one row per tensor, chunk, group or
phase: the values of a row are used together.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from fusedlr.reference import GroupStep
from fusedlr.schedule import SHAPES, Phase, Schedule

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
    """The logarithm of `b`; for 0 a number whose multiples are finite and whose power is 0."""
    return math.log(b) if b > 0 else -128.0


def whole_and_rest(phase: Phase) -> tuple[int, float]:
    """A phase's parameter as what kernels reduce in integers, and the rest."""
    param = phase.shape_param
    if phase.shape == "cosine":
        return int(2 * param), 2 * param - int(2 * param)
    return (int(param), 0.0) if phase.shape in ("restarts", "table") else (0, param)


def pack_phases(schedule: Schedule, position: int) -> tuple[list[int], list[float]]:
    """The rows of a schedule's phases, if its table begins at `position`."""
    ints: list[int] = []
    floats: list[float] = []
    for phase in schedule.phases:
        whole, rest = whole_and_rest(phase)
        whole += position if phase.shape == "table" else 0
        ints += [phase.begin, phase.end, phase.origin, SHAPES.index(phase.shape), whole]
        floats += [phase.from_, phase.to, *split(rest)]  # type: ignore[list-item]
    return ints, floats


@dataclass(frozen=True)
class Bucket:
    """Tensors of one kind, which one launch updates: `programs` rows of the chunk table from `first`."""

    key: Any
    first: int
    programs: int


@dataclass(frozen=True)
class Layout:
    """The chunks of a step, bucket by bucket."""

    chunks: list[int]  # rows of CHUNKS
    buckets: list[Bucket]
    slots: list[tuple[int, int]]  # of every group: its first slot, and one past its last
    programs: int

    @staticmethod
    def of(
        sizes: Sequence[int], keys: Sequence[Hashable], counts: Sequence[int], joint: bool, empty: Hashable
    ) -> Layout:
        """Chunks of tensors with these sizes and buckets; group `i` has the next `counts[i]` of them.

        Where there are no tensors at all, the launch that only counts the step is of the bucket `empty`.
        """
        by_key: dict[Hashable, list[int]] = {key: [] for key in keys}
        slots: list[tuple[int, int]] = []
        slot = tensor = 0
        for group, count in enumerate(counts):
            begin = slot
            for i in range(tensor, tensor + count):
                rows = by_key[keys[i]]
                for index in range(-(-sizes[i] // CHUNK)):
                    rows += i, index, slot, group, slot == begin
                    slot += 1
            # a group without elements still counts the step, unless it stands alone and had no gradient
            if slot == begin and (joint or count):
                by_key.setdefault(keys[0] if keys else empty, []).extend((-1, 0, slot, group, 1))
                slot += 1
            slots.append((begin, slot))
            tensor += count
        filled = {key: rows for key, rows in by_key.items() if rows}
        ends = [0]
        for rows in filled.values():
            ends.append(ends[-1] + len(rows) // len(CHUNKS))
        buckets = [Bucket(key, a, b - a) for key, (a, b) in zip(filled, pairwise(ends), strict=True)]
        return Layout([int(x) for rows in filled.values() for x in rows], buckets, slots, slot)


def pack_groups(
    groups: Sequence[GroupStep], layout: Layout, lr_addresses: Sequence[int], joint: bool
) -> tuple[list[int], list[float]]:
    """The rows of all groups, then those of their schedules' phases, then tables.

    Groups are in the order of their index; a rate on the device is given by its address, else that is 0.
    """
    ints: list[int] = []
    floats: list[float] = []
    phase_ints: list[int] = []
    phase_floats: list[float] = []
    values: list[float] = []
    # groups often share their schedule
    packed: dict[int, tuple[int, int]] = {}
    for group, address, own in zip(groups, lr_addresses, layout.slots, strict=True):
        scope = groups[0] if joint else group
        slots = (0, layout.programs) if joint and group.index == 0 else (0, 0) if joint else own
        phases, rate = (0, 0), 0.0
        if isinstance(group.lr, Schedule):
            if id(group.lr) not in packed:
                first = len(phase_ints) // len(PHASE_INTS)
                more_ints, more_floats = pack_phases(group.lr, len(values))
                phase_ints += more_ints
                phase_floats += more_floats
                values += group.lr.table
                packed[id(group.lr)] = first, len(phase_ints) // len(PHASE_INTS)
            phases, rate = packed[id(group.lr)], group.peak
        elif not isinstance(group.lr, Tensor):
            rate = group.lr
        normed = scope.max_grad_norm is not None or scope.skip_nonfinite
        active = joint or own[0] < own[1]
        ints += [*phases, address, scope.index, normed, scope.skip_nonfinite, group.advance, active, *slots]
        b1, b2 = group.betas
        # a limit of inf still makes nan of a norm that is inf
        limit = math.nan if scope.max_grad_norm is None else scope.max_grad_norm
        floats += [rate, *split(log(b1)), *split(log(b2)), 1 - b1, b2, 1 - b2, group.eps, group.weight_decay]
        floats += [limit, -1.0 if group.maximize else 1.0]
    return [int(x) for x in ints] + phase_ints, floats + phase_floats + values
