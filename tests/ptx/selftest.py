"""The machine held against what is known without it: arithmetic, and litmus tests of its race detector.

A litmus test is a program of a few instructions for which the memory model says whether it has a race.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import torch
from torch import Tensor

from .machine import ORDERS, Machine

_MODULE = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(
 .param .u64 k_param_0,
 .param .u64 k_param_1
)
{{
 .reg .pred %p<9>;
 .reg .b16 %rs<9>;
 .reg .b32 %r<40>;
 .reg .b64 %rd<20>;
 .shared .align 4 .b8 sh[1024];
 ld.param.u64 %rd1, [k_param_0];
 ld.param.u64 %rd2, [k_param_1];
 mov.u32 %r1, %tid.x;
 mov.u32 %r2, %ctaid.x;
 mov.u32 %r3, %ntid.x;
 mad.lo.s32 %r4, %r2, %r3, %r1;
 {body}
 ret;
}}
"""


def _launch(machine: Machine, body: str, a: Tensor, b: Tensor, blocks: int, threads: int) -> set[str]:
    """Run a kernel of two pointers; returns the kinds of what was found wrong."""
    machine.activate(_MODULE.format(body=body), "selftest")
    machine.forget_memory()
    machine.give(a, "a")
    machine.give(b, "b")
    machine.launch("selftest", blocks, threads, struct.pack("<QQ", a.data_ptr(), b.data_ptr()))
    return {line.split(":")[0] for line in machine.take_reports()}


# arithmetic

_BITS = {2: torch.int16, 4: torch.int32}


def _applied(machine: Machine, instruction: str, x: Tensor, out: torch.dtype) -> Tensor:
    """One instruction on every number: from %rs1 or %r9, by its size, to %rs2 or %r10."""
    result = torch.zeros(x.numel(), dtype=out)
    source = "%rs1" if x.element_size() == 2 else "%r9"
    target = "%rs2" if result.element_size() == 2 else "%r10"
    body = f"""
 mul.wide.u32 %rd3, %r4, {x.element_size()};
 add.s64 %rd4, %rd1, %rd3;
 ld.global.b{8 * x.element_size()} {source}, [%rd4];
 {instruction} {target}, {source};
 mul.wide.u32 %rd5, %r4, {result.element_size()};
 add.s64 %rd6, %rd2, %rd5;
 st.global.b{8 * result.element_size()} [%rd6], {target};"""
    found = _launch(machine, body, x, result, x.numel() // 128, 128)
    assert not found, (instruction, found)
    return result


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, but for the bits of a nan."""
    nan, bits = a.isnan() & b.isnan(), _BITS[a.element_size()]
    return torch.equal(a.masked_fill(nan, 0).view(bits), b.masked_fill(nan, 0).view(bits))


def arithmetic(machine: Machine) -> Iterator[str]:
    """Every instruction that rounds otherwise than torch does."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    half, bfloat = patterns.view(torch.float16), patterns.view(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31 - 1, (65536,), generator=generator).to(torch.int32)
    # numbers that fp16 has, and those half way to the next and a quarter
    near_half = [half.float(), half.float() * (1 + 2.0**-11), half.float() * (1 + 2.0**-12)]
    exponents = torch.randint(-28, 18, (65536,), generator=generator).float()
    spread = torch.randn(65536, generator=generator) * torch.exp2(exponents)
    x = torch.cat([any_bits.view(torch.float32), *near_half, spread])
    cases = (
        ("cvt.f32.f16", half, half.float()),
        ("cvt.f32.bf16", bfloat, bfloat.float()),
        ("cvt.rn.f16.f32", x, x.half()),
        ("cvt.rn.bf16.f32", x, x.bfloat16()),
        ("cvt.rmi.f32.f32", x, x.floor()),
        # torch's own square root of fp32 on the CPU may be an ulp off: see fusedlr/reference.py
        ("sqrt.rn.f32", x, x.double().sqrt().float()),
        ("rcp.rn.f32", x, 1 / x),
        ("neg.f32", x, -x),
    )
    for instruction, given, wanted in cases:
        if not _same(_applied(machine, instruction, given, wanted.dtype), wanted):
            yield f"{instruction} rounds otherwise than torch"


# litmus tests

# Two blocks of a thread each: it writes a word of its own and takes a ticket; the last adds up both words.
_TICKET = """
 mul.wide.u32 %rd3, %r2, 4;
 add.s64 %rd4, %rd1, %rd3;
 mov.u32 %r9, 42;
 st.global.u32 [%rd4], %r9;
 {before}
 mov.u32 %r10, 1;
 {ticket}.add.u32 %r11, [%rd1+32], %r10;
 setp.ne.s32 %p1, %r11, 1;
 @%p1 bra $done;
 {after}
 ld.global.u32 %r12, [%rd1];
 ld.global.u32 %r13, [%rd1+4];
 add.s32 %r14, %r12, %r13;
 st.global.u32 [%rd2], %r14;
$done:"""
_FENCE, _ATOMIC = "membar.gl;", "atom.global"

# name -> before the ticket, the ticket, after it, whether that is a race
TICKETS = {
    "fences around a relaxed ticket": (_FENCE, _ATOMIC, _FENCE, False),
    "fences of acq_rel": ("fence.acq_rel.gpu;", _ATOMIC, "fence.acq_rel.gpu;", False),
    "a ticket of acq_rel": ("", "atom.global.gpu.acq_rel", "", False),
    "a ticket that releases, then a fence": ("", "atom.global.gpu.release", _FENCE, False),
    "a fence, then a ticket that acquires": (_FENCE, "atom.global.gpu.acquire", "", False),
    "no fence before": ("", _ATOMIC, _FENCE, True),
    "no fence after": (_FENCE, _ATOMIC, "", True),
    "no fence": ("", _ATOMIC, "", True),
    "fences of the block's scope": ("membar.cta;", _ATOMIC, "membar.cta;", True),
    "a ticket of the block's scope": ("", "atom.global.cta.acq_rel", "", True),
    "a ticket that only releases": ("", "atom.global.gpu.release", "", True),
    "a ticket that only acquires": ("", "atom.global.gpu.acquire", "", True),
}

# Every thread of a block writes a word of shared memory and reads its neighbour's.
_NEIGHBOURS = """
 shl.b32 %r5, %r1, 2;
 mov.u32 %r6, sh;
 add.s32 %r7, %r6, %r5;
 st.shared.u32 [%r7], %r1;
 {between}
 xor.b32 %r8, %r5, 4;
 add.s32 %r9, %r6, %r8;
 ld.shared.u32 %r10, [%r9];
 mul.wide.u32 %rd3, %r1, 4;
 add.s64 %rd4, %rd2, %rd3;
 st.global.u32 [%rd4], %r1;"""

# name -> between the two accesses, whether that is a race
BLOCKS = {
    "a barrier": ("bar.sync 0;", False),
    "nothing": ("", True),
    # it hands a register over, and orders nothing
    "a shuffle": ("shfl.sync.bfly.b32 %r20, %r1, 1, 31, -1;", True),
}


def litmus(machine: Machine) -> Iterator[str]:
    """Every litmus test that the detector judges otherwise than the memory model does."""
    for order in ORDERS:
        machine.order(order, seed=5)
        for name, (before, ticket, after, racy) in TICKETS.items():
            a, b = torch.zeros(16, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
            body = _TICKET.format(before=before, ticket=ticket, after=after)
            found = _launch(machine, body, a, b, blocks=2, threads=1)
            # an interleaving alone never shows the race: only the detector does
            if ("race" in found) != racy or b[0] != 84:
                yield f"between blocks, {name}, {order}: {found or 'no race'}"
        for name, (between, racy) in BLOCKS.items():
            a, b = torch.zeros(4, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
            found = _launch(machine, _NEIGHBOURS.format(between=between), a, b, blocks=1, threads=64)
            if ("race" in found) != racy:
                yield f"in a block, {name}, {order}: {found or 'no race'}"


# name -> what the kernel does, what must be reported
MISTAKES = {
    "reads past the end": (" ld.global.u32 %r9, [%rd1+64];", "out of bounds"),
    "writes before the beginning": (" st.global.u32 [%rd1+-4], %r1;", "out of bounds"),
    "reads off alignment": (" ld.global.u32 %r9, [%rd1+2];", "misaligned"),
    "stores a register that nobody has set": (" st.global.u32 [%rd1], %r30;", "undefined"),
    "branches by shared memory that nobody has written": (
        " ld.shared.u32 %r9, [sh];\n setp.eq.s32 %p1, %r9, 0;\n @%p1 bra $done;\n$done:",
        "undefined",
    ),
    "loops for ever": ("$again:\n bra.uni $again;", "other"),
    "comes to a barrier that others have passed": (
        " setp.eq.s32 %p1, %r1, 0;\n @%p1 bra $done;\n bar.sync 0;\n$done:",
        "sync",
    ),
}


def mistakes(machine: Machine) -> Iterator[str]:
    """Every mistake of a single thread or a block that is not reported."""
    for name, (body, kind) in MISTAKES.items():
        a, b = torch.zeros(16, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
        try:
            found = _launch(machine, body, a, b, blocks=1, threads=2)
        except RuntimeError as error:
            found = {"other"} if "does not end" in str(error) else {str(error)}
        if kind not in found:
            yield f"a kernel that {name}: {found or 'nothing reported'}"


def run(machine: Machine) -> list[str]:
    """All that the machine gets wrong, in words."""
    machine.before_launch(None)
    machine.order("shuffled", seed=1)
    return [*arithmetic(machine), *litmus(machine), *mistakes(machine)]
