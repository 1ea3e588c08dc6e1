"""Faults planted in the compiled kernels, which the cases must show: else it says nothing that they pass.

A fault is an edit of a kernel's PTX: what a compiler would have made of a source with that mistake. An edit
that no longer applies is an error, so the list keeps up with the kernels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu.cases import BF16, CLIP, F32

import fusedlr

from . import driver

# a kernel's PTX, before and after
Change = Callable[[str], str]


@dataclass(frozen=True)
class Kernel:
    """A kernel in which faults are planted: its name, the text that has it, and the cases that run it."""

    name: str
    text: str
    case: str
    tails: str
    off_alignment: str  # by the bytes that `taken` says, or by 8 where 16 are needed
    stale: tuple[torch.dtype, dict[str, Any]]  # type and options with which it makes the first launch
    scopes: str  # of more slots than a warp adds up
    skips: str  # of which some are for gradients that are not finite
    symbol: str = r"\w+"  # among the kernels of the text
    taken: int = 8  # bytes off alignment that the kernel cannot stand


@dataclass(frozen=True)
class Fault:
    """One mistake in one kernel for one architecture, and the cases that show it: none for a stale launch."""

    name: str
    kernel: Kernel
    arch: int
    cases: tuple[str, ...]
    edit: driver.Edit


_FP32 = (
    "fp32",
    "fp32, tails",
    "fp32, gradients off by 8 bytes",
    (F32, CLIP),
    "scopes of many chunks",
    "skips",
)
_TOPS = (
    "fp32, amsgrad",
    "fp32, amsgrad",
    "fp32, amsgrad, gradients off by 8 bytes",
    (F32, {**CLIP, "amsgrad": True}),
    "scopes of many chunks",
    "amsgrad, skips",
)
_RECORD = (
    "fp32, record",
    "record, tails",
    "record, gradients off by 8 bytes",
    (F32, {**CLIP, "record": fusedlr.Record()}),
    "scopes of many chunks",
    "fp32, record",
)
_BF16 = (
    "bf16",
    "bf16, tails",
    "bf16, gradients off by 8 bytes",
    (BF16, CLIP),
    "bf16, scopes of many chunks",
    "bf16, master, skips",
)
_SMALL = (
    "bf16, 16-bit moments",
    "bf16, 16-bit moments, tails",
    "bf16, 16-bit moments, gradients off by 8 bytes",
    (BF16, {**CLIP, "state_dtype": "param"}),
    "bf16, scopes of many chunks",
    "bf16, 16-bit moments, skips",
)
_MASTER = (
    "bf16, master",
    "bf16, master, tails",
    "bf16, master, gradients off by 4 bytes",
    (BF16, {**CLIP, "master_weights": True}),
    "bf16, scopes of many chunks",
    "bf16, master, skips",
)
KERNELS = {
    "cuda": (
        Kernel("norm fp32", "cuda f32", *_FP32, r"\w*norm_kernelIfLi492E\w*"),
        Kernel("norm bf16", "cuda bf16", *_BF16, r"\w*norm_kernelINS_4BF16ELi492E\w*"),
        Kernel("step fp32", "cuda f32", *_FP32, r"\w*step_kernelIffLb0ELb0ELb0ELi492E\w*"),
        Kernel("step fp32, amsgrad", "cuda f32", *_TOPS, r"\w*step_kernelIffLb1ELb0ELb0ELi492E\w*"),
        Kernel("step fp32, record", "cuda f32", *_RECORD, r"\w*step_kernelIffLb0ELb0ELb1ELi492E\w*"),
        Kernel(
            "step bf16, bf16 moments",
            "cuda bf16",
            *_SMALL,
            r"\w*step_kernelINS_4BF16ES1_Lb0ELb0ELb0ELi492E\w*",
        ),
    ),
    "triton": (
        Kernel("norm fp32", "triton norm fp32 None False False False", *_FP32),
        Kernel("norm bf16", "triton norm bf16 None False False False", *_BF16),
        Kernel("step fp32", "triton step fp32 fp32 False False False", *_FP32),
        Kernel("step fp32, amsgrad", "triton step fp32 fp32 True False False", *_TOPS),
        Kernel("step fp32, record", "triton step fp32 fp32 False False True", *_RECORD),
        Kernel("step bf16, bf16 moments", "triton step bf16 bf16 False False False", *_SMALL),
        # gradients are read by 8 bytes, beside moments of fp32
        Kernel("step bf16, master", "triton step bf16 fp32 False True False", *_MASTER, taken=4),
    ),
}

_TICKET = r"\batom\.global[\w.]*\.add\.[\w.]*"
_BARRIER = r"\bbar\.sync\s+0;"
_FENCE = r"fence\.acq_rel\.gpu;"
# the first instruction of what looks whether addresses allow wide accesses; the update is behind it
_ALIGNMENT = r"(and\.b64\s+%rd\d+, %rd\d+,) 15;"
# a bound that is no constant
_BOUND = r"setp\.(lt|le|gt|ge)(\.[su]\d\d\s+%p\d+, %rd?\d+, %rd?\d+;)"
_OFF_BY_ONE = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}


class NotThereError(LookupError):
    """What a fault is to be made of is not in the kernel."""


def put(pattern: str, by: str | Callable[[re.Match[str]], str], nth: int = 0, after: str = "") -> Change:
    """The n-th match of a pattern, counted from behind a place if one is given, replaced."""

    def change(text: str) -> str:
        start = 0
        if after:
            place = re.search(after, text)
            if place is None:
                raise NotThereError(after)
            start = place.end()
        found = list(re.finditer(pattern, text[start:]))
        if not -len(found) <= nth < len(found):
            raise NotThereError(pattern)
        match = found[nth]
        new = match.expand(by) if isinstance(by, str) else by(match)
        return text[: start + match.start()] + new + text[start + match.end() :]

    return change


def _off_by_one(bound: re.Match[str]) -> str:
    return f"setp.{_OFF_BY_ONE[bound[1]]}{bound[2]}"


def _4_bytes_on(store: re.Match[str]) -> str:
    return f"{store[1]}+{int(store[2] or 0) + 4}]"


def _swapped(text: str) -> str:
    """The first two counters of 64 bits that one lane writes behind the ticket change places."""
    start = re.search(_TICKET, text).end()  # type: ignore[union-attr]
    stores = list(re.finditer(r"(@%p\d+ )?st\.global\.[ub]64\s+\[\s*(%rd\d+)", text[start:]))
    by_lane = [[store for store in stores if store[1] == first[1]] for first in stores]
    a, b, *_ = next(own for own in by_lane if len(own) > 1)
    tail = text[start:]
    tail = tail[: a.start(2)] + b[2] + tail[a.end(2) : b.start(2)] + a[2] + tail[b.end(2) :]
    return text[:start] + tail


def _changes(backend: str, kernel: Kernel, text: str) -> Iterator[tuple[str, tuple[str, ...], Change]]:
    """What goes wrong, the cases that show it, and the change of the kernel's text."""
    # barriers that nothing stands between are one
    groups = len(re.findall(rf"(?:{_BARRIER}\s*(?://.*\s*|\$L__tmp\d+:\s*|\.loc.*\s*)*)+", text))
    group = rf"(?:{_BARRIER}\s*(?://.*\s*|\$L__tmp\d+:\s*|\.loc.*\s*)*)+"
    ticket = re.search(_TICKET, text).start()  # type: ignore[union-attr]
    in_front = sum(found.end() <= ticket for found in re.finditer(group, text)) - 1
    for n in range(groups):
        # Triton's reductions bring barriers, of which some order nothing
        if backend == "triton" and "record" in kernel.name and n != in_front:
            continue
        # what counts stale launches is the only code with a barrier before the alignment is looked at
        early = backend == "triton" and kernel.name.startswith("step") and n == 0
        cases = kernel.case, kernel.scopes if kernel.name.startswith("norm") else kernel.skips
        yield f"barrier {n + 1} of {groups} left out", () if early else cases, put(group, "\n", n)
    if backend == "cuda":
        for weaker in ("relaxed.gpu", "acquire.gpu", "release.cta"):
            name = f"a ticket that is {weaker} instead of release.gpu"
            yield name, (kernel.case,), put(r"atom\.global\.release\.gpu", f"atom.global.{weaker}")
        yield "no fence behind the last ticket", (kernel.case,), put(_FENCE, "")
        yield "a fence of the block's scope", (kernel.case,), put(_FENCE, "fence.acq_rel.cta;")
        handed_back = put(r"(@%p\d+\s+)?st\.global\.[ub]32\s[^;]*;", "", 0, _TICKET)
    else:
        for weaker in ("gpu.relaxed", "gpu.acquire", "cta.release"):
            name = f"a ticket that is {weaker} instead of gpu.release"
            yield name, (kernel.case,), put(r"atom\.global\.gpu\.release\.add", f"atom.global.{weaker}.add")
        for weaker in ("gpu.relaxed", "gpu.release", "cta.acquire"):
            name = f"a last ticket that is {weaker} instead of gpu.acquire"
            yield name, (kernel.case,), put(r"atom\.global\.gpu\.acquire\.exch", f"atom.global.{weaker}.exch")
        handed_back = put(r"(acquire)\.exch\.b32(\s[^;]*), %r\d+;", r"\1.add.u32\2, 0;")
    yield "the ticket is not handed back", (kernel.case,), handed_back
    one_less = put(r"(add\.s32\s+%r\d+, %r\d+,) -1;", r"\1 -2;", 0, _TICKET)
    yield "one block too few is waited for", (kernel.case,), one_less
    aligned = put(_ALIGNMENT, rf"\1 {kernel.taken - 1};")
    yield f"{kernel.taken} bytes are taken for aligned", (kernel.off_alignment,), aligned
    yield from _bounds(backend, kernel, text)
    if kernel.name.startswith("norm"):
        square = r"mul\.(?:rn\.)?f32(\s+%\w+), (%\w+), \2;"
        yield "a gradient that is not squared", (kernel.case,), put(square, r"mov.b32\1, \2;")
        return
    yield "no root of the sum of squares", (kernel.case,), put(r"sqrt\.rn\.f32", "mov.b32")
    yield "counters change places", (kernel.case, kernel.skips), _swapped
    yield "a root left out of the update", (kernel.case,), put(r"sqrt\.rn\.f32", "mov.b32", 0, _ALIGNMENT)
    yield "a quotient made a product", (kernel.case,), put(r"div\.rn\.f32", "mul.rn.f32", 0, _ALIGNMENT)
    wide = r"(st(?:\.global)?(?:\.cg)?\.v\d\.\w+\s+\[\s*%rd\d+)(?:\s*\+\s*(-?\d+))?\s*\]"
    yield "a wide store 4 bytes off", (kernel.case,), put(wide, _4_bytes_on, 0, _ALIGNMENT)


def _bounds(backend: str, kernel: Kernel, text: str) -> Iterator[tuple[str, tuple[str, ...], Change]]:
    """Bounds off by one: of elements one by one, of what the last block counts all at once.

    Not those of phases, as most schedules are continuous where they meet.
    """
    found = list(re.finditer(_BOUND, text))
    start = 0 if kernel.name.startswith("norm") else re.search(_ALIGNMENT, text).end()  # type: ignore[union-attr]
    if backend == "cuda":
        barriers = [barrier.start() for barrier in re.finditer(_BARRIER, text)]
        # of the norm's sum, and of the update
        stop = barriers[0] if kernel.name.startswith("norm") else barriers[-1]
        if "record" in kernel.name:
            stop = re.search(_TICKET, text).start()  # type: ignore[union-attr]
        counted = re.compile(_BOUND)
    else:
        # loops over elements have 64 bits; a tile without elements, which `le` lets in, is masked as a whole
        stop = len(text)
        if "record" in kernel.name:
            stop = re.search(_TICKET, text).start()  # type: ignore[union-attr]
        found = [bound for bound in found if re.match(r"setp\.gt\.[su]64", bound[0])]
        counted = re.compile(r"setp\.(lt)(\.s(?:32|64)\s+%p\d+, %rd?\d+, %rd?\d+;)")
    for n, bound in enumerate(bound for bound in found if start < bound.start() < stop):
        cases = kernel.tails, kernel.off_alignment, kernel.skips
        yield f"bound {n + 1} of elements off by one", cases, _at(bound)
    behind = stop if backend == "cuda" else re.search(_TICKET, text).end()  # type: ignore[union-attr]
    yield (
        "a slot, group or tensor too many at the end",
        (kernel.case,),
        lambda text: text[:behind] + counted.sub(_off_by_one, text[behind:]),
    )


def _at(bound: re.Match[str]) -> Change:
    return lambda text: text[: bound.start()] + _off_by_one(bound) + text[bound.end() :]


def _inside(text: str, symbol: str) -> tuple[int, int]:
    """Where a kernel begins and ends in a text of several."""
    found = re.search(rf"\.entry\s+{symbol}\(", text)
    if found is None:
        raise NotThereError(symbol)
    end = text.find(".entry", found.end())
    return found.start(), end if end > 0 else len(text)


def planted(texts: Callable[[int], driver.Texts], backend: str) -> Iterator[Fault]:
    """All faults in the kernels of a backend, for one architecture and the other in turn."""
    for kernel in KERNELS[backend]:
        for i, arch in enumerate(driver.ARCHS):
            text = texts(arch)[kernel.text]
            begin, end = _inside(text, kernel.symbol)
            own = text[begin:end]
            for name, cases, change in list(_changes(backend, kernel, own))[i :: len(driver.ARCHS)]:
                try:
                    wrong = text[:begin] + change(own) + text[end:]
                except NotThereError as error:
                    raise NotThereError(f"{kernel.name}, sm_{arch}: {name}: no {error}") from None
                assert wrong != text, name

                def edit(name: str, text: str, put: str = wrong, where: str = kernel.text) -> str:
                    return put if name == where else text

                yield Fault(f"{kernel.name}, sm_{arch}: {name}", kernel, arch, cases, edit)
