"""Compiles csrc/cuda/step.cu for every GPU it is for, none of which need be here, and says what came out.

Used by test_cuda_compile.py; by hand, from the root, it records the registers.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from fusedlr.columns import header

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

RECORD = ROOT / "bench/results/cuda_registers.json"
# namespace in csrc/cuda/step.cu, also of its moments where they are not fp32
TYPES = ("f32", "bf16", "f16")


def _wide() -> dict[tuple[str, str], tuple[int, int]]:
    """By type and kernel, accesses of 16 bytes to a thread's part of a tile: loads, stores."""
    wide = {}
    for name in TYPES:
        wide[name, "norm"] = 1, 0
        for moments in {"fp32", "fp32" if name == "f32" else name}:
            # four 16-bit elements, beside fp32 moments, take 8 bytes
            params = 0 if name != "f32" and moments == "fp32" else 1
            wide[name, f"step, {moments} moments"] = 2 * params + 2, params + 2
            wide[name, f"step, {moments} moments, amsgrad"] = 2 * params + 3, params + 3
    return wide


WIDE = _wide()


@cache
def recipe() -> ModuleType:
    """csrc/recipe.py, which setup.py imports before there is a package."""
    sys.path.append(str(CSRC))
    return import_module("recipe")


@cache
def why_not() -> str | None:
    """Why nothing can be compiled here."""
    if not CSRC.is_dir():
        return "needs the tree"
    try:
        recipe().cuda_archs(recipe().nvcc())
    except recipe().Unavailable as error:
        return str(error)
    return None


def archs() -> list[int]:
    return recipe().cuda_archs(recipe().nvcc())


def release() -> str:
    """Of nvcc, such as 13.0."""
    said = subprocess.run(
        f"{recipe().nvcc()} --version", shell=True, text=True, capture_output=True, check=True
    )
    return re.findall(r"release (\d+\.\d+)", said.stdout)[0]


def compile_all() -> dict[str, dict[str, dict[str, Any]]]:
    """Facts by type of the parameters, architecture and kernel; one nvcc per type, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TYPES, pool.map(_compile, TYPES), strict=True))


def _compile(name: str) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *shlex.split(recipe().nvcc()),
            *recipe().NVCC_FLAGS.split(),
            "-Xptxas",
            "-v",
            "--keep",
            "--keep-dir",
            folder,
        ]
        for arch in archs():
            command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        command += [f"-DFUSEDLR_TYPE={recipe().CUDA_TYPES[name]}", f"-DFUSEDLR_NAME={name}"]
        Path(folder, "columns.h").write_text(header())
        command += ["-I.", "-c", str(CSRC / "cuda" / "step.cu"), "-o", f"{folder}/step.o"]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        found: dict[str, dict[str, Any]] = {}
        for arch in archs():
            ptx = Path(folder, f"step.compute_{arch}.ptx").read_text()
            found[f"sm_{arch}"] = dict(map(_instructions, re.split(r"\.entry ", ptx)[1:]))
    for said in re.split(r"Compiling entry function ", ran.stderr)[1:]:
        symbol, arch = re.findall(r"'(\w+)' for '(\w+)'", said)[0]
        stack, stores, loads = map(
            int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said)
        )
        found[arch][kernel_name(symbol)] |= {
            "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
            "stack": stack,
            "spilled": stores + loads,
        }
    return found


def kernel_name(symbol: str) -> str:
    """A kernel's name in words: norm_kernel<N>, step_kernel<N, M, AMSGRAD>."""
    kind, n, rest = re.findall(r"(norm|step)_kernelILi(\d+)E(.*?)EEv", f"{symbol}")[0]
    size = "few" if int(n) < 1000 else "many"
    if kind == "norm":
        return f"norm, {size}"
    moments = "fp32" if rest.startswith("f") else "bf16" if "BF16" in rest else "f16"
    return f"step, {moments} moments{', amsgrad' if 'Lb1' in rest else ''}, {size}"


def _instructions(entry: str) -> tuple[str, dict[str, Any]]:
    """A kernel's name and what is in its PTX."""
    lines = (line.split("//")[0].strip() for line in entry.splitlines())
    code = [re.sub(r"^@!?%\w+\s+", "", line) for line in lines if line and not line.startswith(".")]
    names = [line.split()[0] for line in code]
    return kernel_name(entry.split("(")[0]), {
        "loads": len(_wide_accesses(code, "ld")),
        "stores": len(_wide_accesses(code, "st")),
        "local": sum(".local" in line for line in entry.splitlines()),
        # a fused product could be made of what is not told how to round
        "unrounded": [name for name in names if re.match(r"(mul|add|sub)\.(?!rn)[\w.]*f(32|64)", name)],
        "fused_in_update": sum(name.startswith("fma.") for name in _update(code)),
        "products_in_update": sum(name.startswith("mul.rn.f32") for name in _update(code)),
        "fp64": dict(Counter(name for name in names if ".f64" in name and not name.startswith("mov"))),
        "ticket": _around_ticket(names),
    }


def _wide_accesses(code: list[str], access: str) -> list[str]:
    # addresses come from a table, so their space is not known: generic, not .global
    return [line for line in code if re.match(rf"{access}\.(global\.)?(v4\.[fbu]32|v2\.[bu]64)", line)]


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
        if re.match(r"st\.(global\.)?v[248]\.", line)
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
    """Barriers and fences around the only atomic operation."""
    kinds = {
        "bar.sync": "barrier",
        "barrier.sync": "barrier",
        "membar.gl": "fence",
        "fence.": "fence",
        "atom.": "atom",
    }
    order = [kind for name in names for start, kind in kinds.items() if name.startswith(start)]
    at = order.index("atom")
    assert order.count("atom") == 1
    return order[at - 2 : at + 3]


def main() -> None:
    registers = {
        name: {
            arch: {kernel: facts["registers"] for kernel, facts in kernels.items()}
            for arch, kernels in by_arch.items()
        }
        for name, by_arch in compile_all().items()
    }
    RECORD.write_text(
        json.dumps({"release": release(), "registers": registers}, indent=2, sort_keys=True) + "\n"
    )


if __name__ == "__main__":
    main()
