"""Wrong CUDA kernels that the suite must reject: edits to the source of the kernels, and what shows them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

import fusedlr

from . import gpu_runs

Edit = tuple[tuple[str, str], ...]
_SYNC = "    __syncthreads();\n"
_CHUNK, _FIRST = "step.chunks[step.first + blockIdx.x];\n", "step.chunks[blockIdx.x];\n"
_READ = "    // counters have been read"

# name -> edits, each of what the kernels say and what the wrong ones say
EDITS: dict[str, Edit] = {
    # barriers
    "no barrier before sums are read": ((f"sums[warp] = x;\n{_SYNC}", "sums[warp] = x;\n"),),
    "no barrier after the ticket of the norm": (
        (f"{_SYNC}    if (last) finish_norms", "    if (last) finish_norms"),
    ),
    "no barrier after the ticket of the update": (
        (f"{_SYNC}    if (last) count_step", "    if (last) count_step"),
    ),
    "no barrier after the first thread's scalars": ((f"{_SYNC}{_READ}", _READ),),
    "not every thread comes to a barrier": ((f"{_SYNC}{_READ}", f"    if (thread) {_SYNC}{_READ}"),),
    # tickets
    "tickets not handed back": (("    *ticket = 0;\n", ""),),
    "counters moved by the first block": (("!= programs - 1", "!= 0"),),
    "counters moved by every block": (
        ("if (atomicAdd(ticket, 1) != programs - 1) return false;", "atomicAdd(ticket, 1);"),
    ),
    # where a chunk is
    "the first tensor taken for none": (("chunk.tensor < 0", "chunk.tensor <= 0"),),
    "chunks start at 0": (("chunk.index * kChunk, left", "chunk.index * 0, left"),),
    "chunks one element short": (("left < kChunk ? left", "left <= kChunk ? left - 1"),),
    "full chunks alone": (("left < kChunk ? left", "left < kChunk ? 0"),),
    "norm of the first bucket's chunks": ((f"{_CHUNK}    // a replay", f"{_FIRST}    // a replay"),),
    "update of the first bucket's chunks": ((f"{_CHUNK}    if (*step.", f"{_FIRST}    if (*step."),),
    "gradients of the tensor after": (
        ("launch.gradient(chunk.tensor)", "launch.gradient(chunk.tensor ^ 1)"),
    ),
    # wide path and tail
    "tail left out": (("int j = wide + thread; j < count", "int j = wide + thread; j < wide"),),
    "last element left out": (("int j = wide + thread; j < count", "int j = wide + thread; j < count - 1"),),
    "an element of the wide path twice": (
        ("int j = wide + thread;", "int j = (wide ? wide - 1 : 0) + thread;"),
    ),
    "wide steps of one element": (("i += kThreads * kEach;\n", "i += kThreads * kEach + 4;\n"),),
    "wide path one tile short": (("while (i < wide) {", "while (i + kEach < wide) {"),),
    "next tile not read": (("            if (i < wide) some.read(arrays, i);\n", ""),),
    "norm without tails": (("int i = wide + thread; i < count", "int i = wide + thread; i < wide"),),
    "norm without wide path": (("if ((r * kThreads + thread) * kEach >= wide) break;", "break;"),),
    "norm without a wide element": (
        ("j < kEach; ++j) {\n            const", "j < kEach - 1; ++j) {\n            const"),
    ),
    "norm one round short": (
        ("r < kRounds; ++r) {\n        if ((", "r < kRounds - 1; ++r) {\n        if (("),
    ),
    # sums
    "a scope without its first slot, in a warp": (("ints.first_slot + lane", "ints.first_slot + 1 + lane"),),
    "a scope without its last slot, in a warp": (("ints.last_slot, kWarp", "ints.last_slot - 1, kWarp"),),
    "a scope with a slot too many, in a warp": (("ints.last_slot, kWarp", "ints.last_slot + 1, kWarp"),),
    "without the first slot, in a block": (
        ("sum_slots(partials, threadIdx.x", "sum_slots(partials, 1 + threadIdx.x"),
    ),
    "without the last slot, in a block": (("step.programs, kThreads", "step.programs - 1, kThreads"),),
    "a slot too many, in a block": (("step.programs, kThreads", "step.programs + 1, kThreads"),),
    "one round of slots": (("i < last; i += stride", "i < first + stride && i < last; i += stride"),),
    "one round of scopes": (("scope += kThreads / kWarp", "scope += kThreads"),),
    "slots of two chunks in one": (
        ("norms[step.groups + chunk.slot]", "norms[step.groups + chunk.slot / 2 * 2]"),
    ),
    "half a warp": (("int away = kWarp / 2", "int away = kWarp / 4"),),
    "the first warp's sum": (("warp_sum(lane < kThreads / kWarp ?", "warp_sum(lane < 1 ?"),),
    "sum of squares for a norm, in a warp": (
        ("if (lane == 0) step.norms[scope] = sqrtf(sum)", "if (lane == 0) step.norms[scope] = sum"),
    ),
    "sum of squares for a norm, in a block": (("step.norms[0] = sqrtf(sum)", "step.norms[0] = sum"),),
    # decisions
    "norm where none is needed": (
        ('ints.normed ? __ldcg(step.norms + ints.scope) : nanf("")', "__ldcg(step.norms + ints.scope)"),
    ),
    "clipping without the epsilon": (("norm + kClipEps", "norm"),),
    "clipping that scales up": (("coef > 1 || limit != limit", "limit != limit"),),
    "no limit clips by nan": (("coef > 1 || limit != limit", "coef > 1"),),
    "an infinite limit is none": (("limit != limit", "limit != limit || isinf(limit)"),),
    "skip only above 0": (("*step.found_inf != 0", "*step.found_inf > 0"),),
    "inf is applied": (("!isfinite(norm)", "norm != norm"),),
    "nan is applied": (("!isfinite(norm)", "isinf(norm)"),),
    "skip where nan should propagate": (("ints.skip_nonfinite && ", ""),),
    "a skipped step updates": (
        ("    if (!skip) {\n        const Scalars", "    if (true) {\n        const Scalars"),
    ),
    "norm of scaled gradients": (("const float factor = 1 / *step.grad_scale;", "const float factor = 1;"),),
    "scaled gradients": (("1 / scale * decision.coef", "decision.coef"),),
    # counters
    "a skipped step moves the schedule": (("skip ? 0 : ints.advance", "ints.advance"),),
    "a skipped step counts for the bias": (("if (!skip) *global<float>", "*global<float>"),),
    "skips in a row never end": (("skip ? *in_row + 1 : 0", "*in_row + skip"),),
    "every step counts as skipped": (("*skipped += skip", "*skipped += 1"),),
    "inactive groups count": (("if (!ints.active) continue;", ""),),
    "one round of groups": (("i < groups; i += kThreads", "i < groups && i < kThreads; i += kThreads"),),
    "one round of tensors": (
        ("i < step.count; i += kThreads", "i < step.count && i < kThreads; i += kThreads"),
    ),
    "groups decide for each other": (
        (
            "step.group_ints[row.group], step.group_floats[row.group]",
            "step.group_ints[0], step.group_floats[0]",
        ),
    ),
    # scalars
    "bias correction counts from 0": (("double(t) + 1", "double(t) + 0.5"),),
    "rest of the logarithm left out": (
        ("double(floats.log_b2_hi) + double(floats.log_b2_lo)", "double(floats.log_b2_hi)"),
    ),
    "the first schedule for all": (
        ("{phases + ints.first_phase, levels + ints.first_phase}", "{phases, levels}"),
    ),
    "tables start among the levels": (
        ("reinterpret_cast<const float*>(levels + step.phases)", "reinterpret_cast<const float*>(levels)"),
    ),
    "a rate on the device is not looked at": (("ints.lr ? *", "false ? *"),),
    "maximize ignored": (("factor * floats.sign", "factor"),),
    "groups without elements say nothing": (("if (chunk.leads)", "if (chunk.leads && row)"),),
    "amsgrad for all": (("largest = -1;", "largest = 10;"),),
    "largest moment not stored": (("if (AMSGRAD) store(top[i], largest);", ""),),
    "largest moment stored for a group that has none": (
        ("if (AMSGRAD && to.top) copy", "if (AMSGRAD) copy"),
    ),
}

# seen when tensors have moved since the launch was made
STALE_EDITS: dict[str, Edit] = {
    "the norm is not stale": (("    if (*step.alive != step.now) return;\n", ""),),
    "the update is not stale": (("    if (*step.alive != step.now) {", "    if (false) {"),),
    "every block counts a stale launch": (("step.first == 0 && blockIdx.x == 0 && thread", "thread"),),
    "every bucket counts a stale launch": (("step.first == 0 && blockIdx.x", "blockIdx.x"),),
    "a stale launch does not count": (("++step.counters[3 * step.groups];", ";"),),
}

# seen where addresses are in a table
TABLE_EDITS: dict[str, Edit] = {
    "addresses of gradients in the launch alone": (
        ("step.gradients ? step.gradients[i] : gradients[i]", "gradients[i]"),
    ),
}

# seen where the tensor of that name is not at a multiple of 16 bytes, by a compiler that looks
ALIGNMENT_EDITS: dict[str, Edit] = {
    "param": (("at.gradient | at.row->param | moments", "at.gradient | moments"),),
    "grad": (("at.gradient | at.row->param", "at.row->param"),),
    "grad of the norm": (("wide_elements(at, at.gradient, kEach)", "wide_elements(at, 0, kEach)"),),
    "exp_avg": (("at.row->exp_avg | at.row->exp_avg_sq", "at.row->exp_avg_sq"),),
    "exp_avg_sq": (("at.row->exp_avg | at.row->exp_avg_sq", "at.row->exp_avg"),),
    "max_exp_avg_sq": (("(AMSGRAD ? at.row->top : 0)", "0"),),
}


def _tensors(*sizes: int, seed: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in sizes]


def _many() -> list[dict[str, Any]]:
    """Groups of all sorts; scopes of 1 to 40 chunks, and more of them than a block has warps."""
    return [
        {"params": _tensors(8, dtype=torch.bfloat16, seed=1)},
        {
            "params": _tensors(*[8] * 3, seed=2),
            "schedule": fusedlr.table(lambda k: 1 / (2 + k), total_steps=9),
        },
        {"params": _tensors(*[8] * 4, seed=3), "schedule": fusedlr.linear(total_steps=9)},
        {"params": []},
        {"params": _tensors(8, seed=4)},
        {"params": _tensors(8, seed=5), "max_grad_norm": None},
        {"params": _tensors(*[8] * 5, seed=6), "amsgrad": True},
        {"params": _tensors(*[8] * 40, seed=7), "max_grad_norm": 0.1},
        {"params": _tensors(*[8] * 6, seed=8), "betas": (0.5, 0.7)},
        {"params": _tensors(*[8] * 7, seed=9), "eps": 1e-2},
        {"params": _tensors(4099, seed=10)},
    ]


def _joint() -> list[dict[str, Any]]:
    return [{key: group[key] for key in group if key != "max_grad_norm"} for group in _many()]


def _some_without(optimizer: Any, k: int) -> None:
    optimizer.param_groups[4]["params"][0].grad = None
    if k == 1:
        optimizer.param_groups[2]["params"][3].grad[7] = math.nan
        optimizer.param_groups[8]["params"][0].grad[0] = -math.inf


def _infinite(optimizer: Any, k: int) -> None:
    optimizer.param_groups[0]["params"][0].grad[0] = math.inf


def _wide() -> list[dict[str, Any]]:
    """More groups, and more tensors, than a block has threads."""
    return [{"params": _tensors(*[4] * 300, seed=11)}, *({"params": []} for _ in range(260))]


def _one() -> list[dict[str, Any]]:
    return [{"params": _tensors(40, 4097, seed=12)}]


RUNS = (
    *gpu_runs.RUNS,
    (_many, {"steps": 4, "before": _some_without, "groups": "independent", "nonfinite": "skip"}),
    (_many, {"steps": 2, "groups": "independent", "nonfinite": "propagate"}),
    (_joint, {"steps": 2, "before": _some_without}),
    (_wide, {"steps": 2}),
    (_one, {"steps": 2, "nonfinite": "propagate", "max_grad_norm": None}),
    (_one, {"steps": 1, "nonfinite": "propagate", "max_grad_norm": math.inf, "before": _infinite}),
    (_one, {"steps": 2, "schedule": None, "lr": torch.tensor(0.3)}),
)
