"""The CUDA kernels compiled by nvcc for every GPU they are for: what ptxas says, instructions in the PTX.

After a change to a kernel, record the registers, from the root:
`PYTHONPATH=. python tests/gpu/cuda_compile.py`.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from gpu import cuda_compile
from gpu.cuda_compile import RECORD, TYPES, WIDE, archs, release, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

# registers that another release of the compiler may take more
ALLOWANCE = 8


@cache
def found() -> dict[str, dict[str, dict[str, Any]]]:
    """Facts by type of the parameters, architecture and kernel."""
    return cuda_compile.compile_all()


def kernels() -> list[tuple[str, str, str, dict[str, Any]]]:
    return [
        (name, arch, kernel, facts)
        for name, by_arch in found().items()
        for arch, by_kernel in by_arch.items()
        for kernel, facts in by_kernel.items()
    ]


def test_every_variant_is_there() -> None:
    for name in TYPES:
        moments = {"fp32"} if name == "f32" else {"fp32", name}
        steps = {
            f"step, {m} moments{top}, {size}"
            for m in moments
            for top in ("", ", amsgrad")
            for size in ("few", "many")
        }
        for arch in archs():
            assert set(found()[name][f"sm_{arch}"]) == steps | {"norm, few", "norm, many"}


def test_nothing_spills() -> None:
    for *where, facts in kernels():
        assert (facts["stack"], facts["spilled"], facts["local"]) == (0, 0, 0), where


def test_registers_are_those_recorded() -> None:
    recorded = json.loads(RECORD.read_text())
    allowance = 0 if release() == recorded["release"] else ALLOWANCE
    for name, arch, kernel, facts in kernels():
        # of this release they are known exactly
        more = facts["registers"] - recorded["registers"][name][arch][kernel]
        assert more <= allowance and (allowance or more == 0), (name, arch, kernel, facts["registers"])


def test_registers_let_512_threads_in() -> None:
    # as __launch_bounds__ asks: 64K registers of a multiprocessor over 512 threads
    assert max(facts["registers"] for *_, facts in kernels()) <= 128


def test_the_wide_path_moves_16_bytes_at_a_time() -> None:
    for name, arch, kernel, facts in kernels():
        loads, stores = WIDE[name, kernel.rsplit(", ", 1)[0]]
        # the loop has them again, unrolled loops and one loop per form of the first moment several times
        assert facts["loads"] >= loads and facts["loads"] % loads == 0, (name, arch, kernel, facts)
        loops = facts["stores"] // stores if stores else 0
        assert facts["stores"] == loops * stores and (loops > 0) == (stores > 0), (name, arch, kernel, facts)


def test_products_are_rounded() -> None:
    for *where, facts in kernels():
        # fused products of the schedule's functions come from CUDA's library
        assert facts["unrounded"] == [], where
        assert facts["fused_in_update"] == 0, where
        # seven in each of four elements: what was followed is the update
        assert facts["products_in_update"] >= (28 if where[2].startswith("step") else 0), where


def test_fp64_is_for_the_bias_corrections_alone() -> None:
    for name, arch, kernel, facts in kernels():
        # t, four parts of logarithms and two rounded products; t + 1 and two sums of parts; the products,
        # their rests, and the roundings of both
        two = {"cvt.f64.f32": 5 + 2, "add.rn.f64": 3, "mul.rn.f64": 2, "sub.rn.f64": 2, "cvt.rn.f32.f64": 4}
        assert facts["fp64"] == (two if kernel.startswith("step") else {}), (
            name,
            arch,
            kernel,
            facts["fp64"],
        )


def test_the_ticket_is_taken_between_barriers_and_fences() -> None:
    for *where, facts in kernels():
        assert facts["ticket"] == ["barrier", "fence", "atom", "fence", "barrier"], where
