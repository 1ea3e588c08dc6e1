"""The names that Python, C++, CUDA and Triton share: what is kept per tensor, and the columns of every table.

`header` writes them for csrc/, where they are the generated columns.h. torch is not imported here: setup.py
reads this file before there is one.
"""

from typing import NamedTuple


class KeptTensor(NamedTuple):
    """A tensor that the optimizer keeps per parameter."""

    option: str | None = None  # under which there is one; None where there always is
    of: str | None = None  # dtype of the parameters that have one; None: all have
    dtype: str | None = None  # its own; None: that of the moments


# What there is per parameter in `optimizer.state`, beside `step`. The last two are what a 16-bit parameter
# lacks of its value in fp32: the low half of its bits, or all of it.
STATE = {
    "exp_avg": KeptTensor(),
    "exp_avg_sq": KeptTensor(),
    "max_exp_avg_sq": KeptTensor("amsgrad"),
    "param_remainder": KeptTensor("master_weights", "bfloat16", "int16"),
    "master_param": KeptTensor("master_weights", "float16", "float32"),
}
_BYTES = {None: 0, "int16": 2, "float32": 4}

# The rows of integers per group: updates made; steps skipped, and those since the last update; replays of a
# captured step that found other tensors and did nothing; of the latest step that was skipped for a gradient
# of the group that is not finite, the place of the first such tensor in the group, plus 1, and the number of
# that step, made and skipped ones counted from 0; and 2**31 less the place of such a tensor that a GPU step
# has found so far.
COUNTS = ("k", "skipped", "skips_in_row", "stale", "nonfinite", "nonfinite_step", "found")

# The rows of floats per group: what the last step used; what the blocks of a step on a GPU tell the last one,
# which counts it (what a `ZClip` holds the norm to, and whether the step is skipped); and the norms so far of
# a scope that has a `ZClip`, in the column of its first group: how many, and their mean and variance, each
# the sum of two numbers, because fp32 has too few digits.
METRICS = ("lr", "grad_norm", "coef", "limit")
NORMS = ("seen", "mean", "mean_rest", "variance", "variance_rest")
USED = (*METRICS, "held", "skip", *NORMS)

# What is recorded of a step: per group, and per tensor the sums of squares of its unscaled gradient, of its
# change as stored, and of what it was before.
RECORDED = (*METRICS, "skip")
SUMS = ("grad", "change", "before")

# Elements per chunk of a tensor, which is the work of one program on a GPU. Its own part of the traffic, 112
# KiB in fp32, is some 30 times what it reads to get there, and tensors of a few thousand elements still
# spread over all processors.
CHUNK = 4096

# The tables of a step on a GPU are matrices in row-major order, as the values of a row are used together.

# int64 per tensor: addresses, number of elements, index of its group, its place in the group, its column in
# what is recorded, the slot of its first chunk
TENSORS = ("param", *STATE, "step", "numel", "group", "place", "column", "slot")
# int32 per chunk: its tensor (-1: none), which chunk of the tensor it is, its slot in the partial sums (which
# are in the order of scopes, groups and tensors), its group, the group's scope (so that a program reads the
# rows of both at once), whether it is the group's first
CHUNKS = ("tensor", "index", "slot", "group", "scope", "first_of_group")
# int64 per group: rows of its schedule's phases (none: the rate is given), address of a rate on the device or
# 0 (the rate is a number in a table of its own), its scope
GROUP_INTS = ("first_phase", "last_phase", "lr", "scope")
# fp32 per group: the peak; betas as the step needs them; sign is -1 to maximize
GROUP_FLOATS = (
    "peak",
    "log_b1_hi",
    "log_b1_lo",
    "log_b2_hi",
    "log_b2_lo",
    "one_b1",
    "b2",
    "one_b2",
    "eps",
    "weight_decay",
    "sign",
)
# int64 per scope: whether its norm is needed, whether it skips a step whose norm is not finite, whether it
# decides by its norm alone whatever a scaler has found, its slots in the partial sums, its first group,
# whether it skips spikes
SCOPE_INTS = (
    "normed",
    "skip_nonfinite",
    "by_own_norm",
    "first_slot",
    "last_slot",
    "first_group",
    "skip_spikes",
)
# fp32 per scope: what its norm never exceeds, nan without clipping; of its `ZClip` the norms before the first
# spike, z_thresh and 1 - alpha, which is 0 where there is none
SCOPE_FLOATS = ("max_grad_norm", "warmup_steps", "z_thresh", "one_alpha")
# int64 per phase; `whole` is restarts, whole half waves, or the position in the table
PHASE_INTS = ("begin", "end", "origin", "shape", "whole")
# int64 that say where steps are recorded: addresses of the tensors of a `record.Ring`, and of the sums of
# squares of every chunk, of shape (3, chunks); how many steps the ring keeps, and of how many tensors; how
# many chunks the largest tensor has
RING = ("steps", "ints", "used", "sums", "chunk_sums", "last", "columns", "most_chunks")
# fp32 per phase; the parts of `param` add up to the power, the time scale or the rest of a half wave
PHASE_FLOATS = ("from_", "to", "param_hi", "param_lo")

# C++ struct -> type of its members, and their names
_STRUCTS = {
    "TensorRow": ("int64_t", TENSORS),
    "ChunkRow": ("int32_t", CHUNKS),
    "GroupInts": ("int64_t", GROUP_INTS),
    "GroupFloats": ("float", GROUP_FLOATS),
    "ScopeInts": ("int64_t", SCOPE_INTS),
    "ScopeFloats": ("float", SCOPE_FLOATS),
    "PhaseInts": ("int64_t", PHASE_INTS),
    "RingInts": ("int64_t", RING),
    "PhaseFloats": ("float", PHASE_FLOATS),
}


def header() -> str:
    """The same names in C++: an index for every row and tensor of the state, a struct per table."""
    sizes = ", ".join(str(_BYTES[kept.dtype]) for kept in STATE.values())
    lines = [
        "// Generated from fusedlr/columns.py.",
        "#pragma once",
        "#include <cstdint>",
        "namespace fusedlr {",
        f"enum State : int {{ {', '.join(f'k_{name}' for name in STATE)}, kStates }};",
        "// bytes of an element, 0 for those of the moments' type",
        f"constexpr int kStateBytes[kStates] = {{{sizes}}};",
        f"enum Count : int {{ {', '.join(f'k_{name}' for name in COUNTS)}, kCounts }};",
        f"enum Used : int {{ {', '.join(f'k_{name}' for name in USED)}, kUsed }};",
        # the others that are recorded are the first that are used
        f"enum Recorded : int {{ k_recorded_skip = {RECORDED.index('skip')}, kRecorded }};",
        f"enum Sum : int {{ {', '.join(f'k_{name}' for name in SUMS)}, kSums }};",
        f"constexpr int64_t kChunkElements = {CHUNK};",
    ]
    for struct, (type_, names) in _STRUCTS.items():
        lines.append(f"struct {struct} {{ {type_} {', '.join(names)}; }};")
    return "\n".join([*lines, "}  // namespace fusedlr", ""])
