"""The CUDA kernels, compiled by every NVRTC here: registers, and instructions of the PTX.

The newest NVRTC compiles them for every GPU, others for one of every generation, or with FUSEDLR_ALL_ARCHS=1
for every GPU, too. After a change to a kernel, record the registers, from the root:
`PYTHONPATH=. python tests/gpu/cuda_compile.py`.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from fusedlr.backends.gpu.nvrtc import found as libraries
from gpu import cuda_compile
from gpu.cuda_compile import RECORD, TYPES, WIDE, archs, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

# registers that another release of the compiler may take more
ALLOWANCE = 8


@cache
def kernels() -> list[tuple[str, str, str, str, dict[str, Any]]]:
    """NVRTC's version, type of the parameters, architecture, kernel, facts."""
    return [
        (str(nvrtc), name, arch, kernel, facts)
        for nvrtc in libraries()
        for name, by_arch in cuda_compile.compile_all(nvrtc).items()
        for arch, by_kernel in by_arch.items()
        for kernel, facts in by_kernel.items()
    ]


def test_every_variant_is_there() -> None:
    for name in TYPES:
        moments = {"fp32"} if name == "f32" else {"fp32", name}
        steps = {
            f"step, {m} moments{top}{master}{record}, {size}"
            for m in moments
            for top in ("", ", amsgrad")
            for master in (("",) if name == "f32" else ("", ", master"))
            for record in ("", ", record")
            for size in ("few", "many")
            if not record or size == "few"
        }
        for nvrtc in libraries():
            for arch in archs(nvrtc):
                made = cuda_compile.compile_all(nvrtc)[name][f"sm_{arch}"]
                recording = {step for step in steps if "record" in step}
                left_out = set() if arch in cuda_compile.FIRST_ARCHS else recording
                assert set(made) == (steps - left_out) | {"norm, few", "norm, many"}


def test_nothing_spills() -> None:
    for *where, facts in kernels():
        assert (facts["stack"], facts["spilled"], facts["local"]) == (0, 0, 0), where


def test_registers_are_those_recorded() -> None:
    recorded = json.loads(RECORD.read_text())
    for nvrtc, name, arch, kernel, facts in kernels():
        # of a release that was recorded they are known exactly, of another by the nearest
        allowance = 0 if nvrtc in recorded else ALLOWANCE
        known = recorded.get(nvrtc) or recorded[max(recorded, key=lambda version: version[:2] == nvrtc[:2])]
        more = facts["registers"] - known[name].get(arch, known[name]["sm_90"])[kernel]
        assert more <= allowance and (allowance or more == 0), (name, arch, kernel, facts["registers"])


def test_as_many_blocks_fit_as_kernels_ask_for() -> None:
    # of 256 threads, whose registers are given out in eights, into the 64K of a processor; those of sm_80 and
    # sm_90 have room for 2,048 threads, others for fewer
    for _, name, arch, kernel, facts in kernels():
        fit = 65536 // (256 * 8 * -(-facts["registers"] // 8))
        if "record" in kernel:
            wanted = 2
        elif kernel.startswith("step"):
            wanted = 4 if "fp32 moments" in kernel else 3
        elif arch in ("sm_80", "sm_90"):
            wanted = 6 if name == "f32" else 8
        else:
            wanted = 4
        assert fit >= wanted, (name, arch, kernel, facts["registers"])


def test_the_wide_path_moves_16_bytes_at_a_time() -> None:
    for _, name, arch, kernel, facts in kernels():
        # what is recorded was read anyway
        loads, stores = WIDE[name, kernel.rsplit(", ", 1)[0].removesuffix(", record")]
        # the loop has them again, unrolled loops and one loop per form of the first moment several times
        assert facts["loads"] >= loads and facts["loads"] % loads == 0, (name, arch, kernel, facts)
        loops = facts["stores"] // stores if stores else 0
        assert facts["stores"] == loops * stores and (loops > 0) == (stores > 0), (name, arch, kernel, facts)


def test_every_access_to_elements_says_which_memory_it_is_to() -> None:
    for *where, facts in kernels():
        assert facts["generic"] == [], where


def test_products_are_rounded() -> None:
    for *where, facts in kernels():
        # fused products of the schedule's functions come from CUDA's library
        assert facts["unrounded"] == [], where
        assert facts["fused_in_update"] == 0, where
        # seven in each of four elements: what was followed is the update
        assert facts["products_in_update"] >= (28 if where[3].startswith("step") else 0), where


def test_fp64_is_for_the_bias_corrections_alone() -> None:
    for _, name, arch, kernel, facts in kernels():
        # t, four parts of logarithms and two rounded products; t + 1 and two sums of parts; the products,
        # their rests, and the roundings of both
        two = {"cvt.f64.f32": 5 + 2, "add.rn.f64": 3, "mul.rn.f64": 2, "sub.rn.f64": 2, "cvt.rn.f32.f64": 4}
        assert facts["fp64"] == (two if kernel.startswith("step") else {}), (
            name,
            arch,
            kernel,
            facts["fp64"],
        )


def test_the_ticket_releases_between_barriers_and_the_last_one_acquires() -> None:
    for *where, facts in kernels():
        assert facts["ticket"] == ["barrier", "release", "fence", "barrier"], where
