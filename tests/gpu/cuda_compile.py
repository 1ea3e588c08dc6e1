"""Compiles csrc/cuda/step.cu for every GPU it is for, none of which need be here, and says what came out.

Used by test_cuda_compile.py; by hand, from the root, it records the registers.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from fusedlr.backends.gpu import kernels
from fusedlr.backends.gpu.nvrtc import Compiled, Nvrtc, found

RECORD = Path(__file__).resolve().parents[2] / "bench/results/cuda_registers.json"
# the types of parameters, also of moments where they are not fp32
TYPES = tuple(kernels.TYPES)


def _wide() -> dict[tuple[str, str], tuple[int, int]]:
    """By type and kernel, accesses of 16 bytes to a thread's part of a tile: loads, stores."""
    wide = {}
    for name in TYPES:
        wide[name, "norm"] = 1, 0
        for moments in {"fp32", "fp32" if name == "f32" else name}:
            # four 16-bit elements, beside fp32 moments, take 8 bytes
            params = 0 if name != "f32" and moments == "fp32" else 1
            for top in (0, 1):
                kernel = f"step, {moments} moments{', amsgrad' * top}"
                loads, stores = 2 * params + 2 + top, params + 2 + top
                wide[name, kernel] = loads, stores
                # the rest of a bf16 parameter's value takes its bytes once more, of an fp16 one twice that
                rest = params if name == "bf16" else 1 + params
                if name != "f32":
                    wide[name, f"{kernel}, master"] = loads + rest, stores + rest
    return wide


WIDE = _wide()


@cache
def why_not() -> str | None:
    """Why nothing can be compiled here."""
    return None if found() else "there is no NVRTC"


def nvrtc(major: int | None = None) -> Nvrtc:
    """The NVRTC that would be used, or that of a major version of CUDA."""
    (first, *_) = [each for each in found() if major in (None, each.version[0])]
    return first


# the first architecture of every generation. For these alone kernels that record are looked at, those for the
# smaller launches: they are as many as the others, and compiling all of both takes minutes
FIRST_ARCHS = (75, 80, 90, 100, 120)


def archs(nvrtc: Nvrtc) -> list[int]:
    """The architectures that kernels are compiled for: all that the NVRTC that would be used knows.

    For another one the first of every generation will do, unless FUSEDLR_ALL_ARCHS=1 asks for all.
    """
    known = [arch for arch in nvrtc.archs if arch >= kernels.MIN_ARCH]
    if nvrtc == found()[0] or os.environ.get("FUSEDLR_ALL_ARCHS") == "1":
        return known
    return [arch for arch in known if arch in FIRST_ARCHS]


def compile_type(
    nvrtc: Nvrtc,
    arch: str,
    name: str,
    *options: str,
    ptx: bool = False,
    recorded: Iterable[str] = kernels.SIZES,
) -> Compiled:
    """All kernels for one type of parameters, for launches of both sizes; those that record for launches of
    the `recorded` ones.
    """
    text, headers = kernels.sources()
    wanted = [
        kernel
        for size in kernels.SIZES
        for master in (False, True)
        if name in kernels.types(master=master)
        for record in ((False, True) if size in recorded else (False,))
        for kernel in kernels.kernel_names(name, size, master=master, record=record)
    ]
    return nvrtc.compile(text, arch, wanted, headers, (*kernels.OPTIONS, *options), ptx=ptx)


@cache
def compile_all(nvrtc: Nvrtc) -> dict[str, dict[str, dict[str, Any]]]:
    """Facts by type of the parameters, architecture and kernel; two compilers at a time."""
    wanted = [(name, arch) for name in kernels.TYPES for arch in archs(nvrtc)]
    facts: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in kernels.TYPES}
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda each: _facts(nvrtc, *each), wanted)
        for (name, arch), found in zip(wanted, made, strict=True):
            facts[name][f"sm_{arch}"] = found
    return facts


def _facts(nvrtc: Nvrtc, name: str, arch: int) -> dict[str, Any]:
    recorded = ("few",) if arch in FIRST_ARCHS else ()
    made = compile_type(nvrtc, f"sm_{arch}", name, "--ptxas-options=-v", ptx=True, recorded=recorded)
    facts = dict(map(_instructions, re.split(r"\.entry ", made.ptx)[1:]))
    for of in re.split(r"Compiling entry function ", made.log)[1:]:
        symbol = re.findall(r"'(\w+)' for ", of)[0]
        stack, stores, loads = map(
            int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", of)
        )
        facts[kernel_name(symbol)[1]] |= {
            "registers": int(re.findall(r"Used (\d+) registers", of)[0]),
            "stack": stack,
            "spilled": stores + loads,
        }
    return facts


def kernel_name(symbol: str) -> tuple[str, str]:
    """The type of the parameters, and norm_kernel<P, N> or step_kernel<P, M, AMSGRAD, MASTER, RECORD, N> in
    words.
    """
    kind, param, moments, amsgrad, master, record, n = re.findall(
        r"(norm|step)_kernelI(f|NS_4BF16E|NS_3F16E)(f|S1_)?(?:Lb(\d)ELb(\d)ELb(\d)E)?Li(\d+)E", symbol
    )[0]
    name = {"f": "f32", "NS_4BF16E": "bf16", "NS_3F16E": "f16"}[param]
    size = "few" if int(n) < 1000 else "many"
    if kind == "norm":
        return name, f"norm, {size}"
    top = ", amsgrad" * (amsgrad == "1") + ", master" * (master == "1") + ", record" * (record == "1")
    return name, f"step, {'fp32' if moments == 'f' else name} moments{top}, {size}"


def _instructions(entry: str) -> tuple[str, dict[str, Any]]:
    """A kernel's name and what is in its PTX."""
    lines = (line.split("//")[0].strip() for line in entry.splitlines())
    code = [re.sub(r"^@!?%\w+\s+", "", line) for line in lines if line and not line.startswith(".")]
    names = [line.split()[0] for line in code]
    return kernel_name(entry.split("(")[0])[1], {
        "loads": len(_wide_accesses(code, "ld")),
        "stores": len(_wide_accesses(code, "st")),
        "local": sum(".local" in line for line in entry.splitlines()),
        # addresses come from tables: without a word, each access would find out what memory it is to
        "generic": [line for line in code if re.match(r"(ld|st)\.(v\d|u16|b16)", line)],
        # a fused product could be made of what is not told how to round
        "unrounded": [name for name in names if re.match(r"(mul|add|sub)\.(?!rn)[\w.]*f(32|64)", name)],
        "fused_in_update": sum(name.startswith("fma.") for name in _update(code)),
        "products_in_update": sum(name.startswith("mul.rn.f32") for name in _update(code)),
        "fp64": dict(Counter(name for name in names if ".f64" in name and not name.startswith("mov"))),
        "ticket": _around_ticket(names),
    }


def _wide_accesses(code: list[str], access: str) -> list[str]:
    return [line for line in code if re.match(rf"{access}\.global\.cg\.v4\.[fbu]32", line)]


def _update(code: list[str]) -> list[str]:
    """The instructions that make what is stored several elements at a time out of what is loaded."""
    made: dict[str, list[str]] = {}
    for line in code:
        target = re.match(r"\S+\s+(%\w+|\{[^}]*\})(?:\|%\w+)?,", line)
        if target and not line.startswith("st"):
            for register in re.findall(r"%\w+", target[1]):
                made.setdefault(register, []).append(line)
    todo = [
        register
        for line in code
        if re.match(r"st\.global\.cg\.v[248]\.", line)
        for register in re.findall(r"%\w+", line.split("]")[1])
    ]
    seen: set[str] = set()
    names = []
    while todo:
        register = todo.pop()
        if register in seen:
            continue
        seen.add(register)
        for line in made.get(register, []):
            names.append(line.split()[0])
            if not line.startswith("ld"):
                todo += re.findall(r"%\w+", line.split(",", 1)[1])
    return names


def _around_ticket(names: list[str]) -> list[str]:
    """The only atomic operation that orders others, and the barriers and fences around it."""
    kinds = {
        "bar.sync": "barrier",
        "barrier.sync": "barrier",
        "membar.gl": "full fence",
        "fence.sc": "full fence",
        "fence.acq_rel.gpu": "fence",
        "atom.release.gpu.global": "release",
        "atom.global.release.gpu": "release",
    }
    order = [kind for name in names for start, kind in kinds.items() if name.startswith(start)]
    at = order.index("release")
    assert sum(name.startswith("atom.") and ".add." in name for name in names) == 1
    return order[at - 1 : at + 3]


def main() -> None:
    os.environ["FUSEDLR_ALL_ARCHS"] = "1"
    recorded = {}
    for nvrtc in found():
        recorded[str(nvrtc)] = {
            name: {
                arch: {kernel: facts["registers"] for kernel, facts in of.items()}
                for arch, of in by_arch.items()
            }
            for name, by_arch in compile_all(nvrtc).items()
        }
    RECORD.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
