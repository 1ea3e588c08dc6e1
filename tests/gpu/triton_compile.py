"""Compile the Triton kernels for a GPU that need not be here, and say what is in the assembly, as JSON.

Run by test_triton_compile.py, once per version of Triton, and by ptx/driver.py, for all variants' PTX; by
hand, from the root, to record the registers:
`PYTHONPATH=. python tests/gpu/triton_compile.py --record bench/results/triton_registers.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fusedlr.backends.gpu import triton_kernels

TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_POINTERS = {
    "*i64": ("tensors", "gradients", "ints", "counts", "ring"),
    "*i32": ("chunks", "active", "tickets", "generation"),
    "*fp32": ("floats", "rates", "used", "squares", "partials", "grad_scale", "found_inf"),
}
_TYPES = {name: kind for kind, names in _POINTERS.items() for name in names}
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# elements per thread of a wide tile, and bytes of a wide access
_WIDE_BYTES = 16
# kernel, parameters, moments, and whether amsgrad, master, record
VARIANTS = {
    "step fp32": ("step", "fp32", "fp32", False, False, False),
    "step fp32 amsgrad": ("step", "fp32", "fp32", True, False, False),
    "step bf16": ("step", "bf16", "fp32", False, False, False),
    "step bf16 amsgrad": ("step", "bf16", "fp32", True, False, False),
    "step bf16, bf16 moments": ("step", "bf16", "bf16", False, False, False),
    "step bf16, master": ("step", "bf16", "fp32", False, True, False),
    "step bf16 amsgrad, master": ("step", "bf16", "fp32", True, True, False),
    "step fp16": ("step", "fp16", "fp32", False, False, False),
    "step fp16, master": ("step", "fp16", "fp32", False, True, False),
    "step fp32, record": ("step", "fp32", "fp32", False, False, True),
    "step fp32 amsgrad, record": ("step", "fp32", "fp32", True, False, True),
    "step bf16, record": ("step", "bf16", "fp32", False, False, True),
    "step bf16 amsgrad, master, record": ("step", "bf16", "fp32", True, True, True),
    "norm fp32": ("norm", "fp32", None, None, None, None),
    "norm bf16": ("norm", "bf16", None, None, None, None),
}
# takes a ticket, or hands all of them back
_TICKET = {"cuda": r"\batom\.[\w.]*\.(add|exch)\.", "hip": r"_atomic_(add|swap)"}
# bytes of what the state has of a parameter's fp32 value
_REST = {"bf16": 2, "fp16": 4}


def compiled(
    name: str,
    params: str,
    moments: str | None,
    amsgrad: bool | None,
    master: bool | None,
    record: bool | None,
    target: GPUTarget,
) -> Any:
    """What Triton makes of one variant of a kernel, as a launch on this GPU would have it compiled."""
    kernel = getattr(triton_kernels, f"{name}_kernel")
    constants: dict[str, Any] = {"PARAMS": tl.str_to_ty(params, None)}
    if name == "step":
        constants |= {"MOMENTS": tl.str_to_ty(moments, None), "AMSGRAD": amsgrad}
        constants |= {"MASTER": master, "RECORD": record}
    signature = {arg: "constexpr" if arg in constants else _TYPES.get(arg, "i32") for arg in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    options = triton_kernels.options(target, bool(amsgrad), bool(master), bool(record))
    return triton.compile(source, target=target, options=options)


def facts(variant: str, target_name: str) -> dict[str, Any]:
    """What the assembly of one kernel for one GPU holds."""
    name, params, moments, amsgrad, master, record = VARIANTS[variant]
    target = TARGETS[target_name]
    asm = compiled(name, params, moments, amsgrad, master, record, target).asm
    elements = triton_kernels.WIDE.value // triton_kernels.THREADS
    p, m = (_BYTES[dtype] for dtype in (params, moments or params))
    state = [m] * (2 + bool(amsgrad)) + ([_REST[params]] if master else [])
    loads, stores = ([p, p, *state], [p, *state]) if name == "step" else ([p], [])
    # a thread has as many elements of every array as 16 bytes of the widest hold: all have the same layout
    together = _WIDE_BYTES // max(loads)
    wanted = {}
    for access, arrays in (("loads", loads), ("stores", stores)):
        for kind, size in ((access, _WIDE_BYTES), (f"{access} of half", _WIDE_BYTES // 2)):
            wanted[kind] = sum(each * together == size for each in arrays) * elements // together
    read = _nvidia if target.backend == "cuda" else _amd
    of_tiles = rf"convert_layout .*tensor<{triton_kernels.WIDE.value}x"
    return {"wanted": wanted, "converted": len(re.findall(of_tiles, asm["ttgir"])), **read(asm)}


def _nvidia(asm: Any) -> dict[str, Any]:
    code = _instructions(asm["ptx"], comments="//")
    loads = [line for line in code if re.search(r"\bld\.global[\w.:]*\.(v4\.b32|v2\.b64|v8\.b32)", line)]
    stores = [line for line in code if re.search(r"\bst\.global[\w.:]*\.(v4\.b32|v2\.b64|v8\.b32)", line)]
    return {
        **_resources(asm["cubin"]),
        "loads": len(loads),
        "stores": len(stores),
        "loads of half": sum(bool(re.search(r"\bld\.global[\w.:]*\.v2\.b32", line)) for line in code),
        "stores of half": sum(bool(re.search(r"\bst\.global[\w.:]*\.v2\.b32", line)) for line in code),
        "fp64": sum(".f64" in line for line in code),
        "local": sum(".local" in line for line in code),
        "fused": sum(bool(re.search(r"\bfma\.", line)) for line in code),
        "ticket": [line for line in code if re.search(_TICKET["cuda"], line)],
        "fences": sum(bool(re.search(r"\b(fence|membar)\.", line)) for line in code),
        "beside_tickets": _beside(code, _TICKET["cuda"], r"\bbar(rier)?\.[\w.]*sync", r"\b(ld|st)\.global"),
    }


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    registers, stack, local = map(int, found.groups())
    # what is spilled lies on the stack
    return {"registers": registers, "spilled": stack + local}


def _amd(asm: Any) -> dict[str, Any]:
    text = asm["amdgcn"]
    code = _instructions(text, comments=";")

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])

    return {
        "registers": number("vgpr_count"),
        # to memory: scalars that spill lie in lanes of vector registers
        "spilled": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        # tables are read by other instructions, or by scalar ones
        "loads": sum(line.startswith("buffer_load_dwordx4") for line in code),
        "stores": sum(line.startswith("buffer_store_dwordx4") for line in code),
        "loads of half": sum(line.startswith("buffer_load_dwordx2") for line in code),
        "stores of half": sum(line.startswith("buffer_store_dwordx2") for line in code),
        "fp64": sum(bool(re.search(r"_f64\b|_f64_", line)) for line in code),
        "local": sum("scratch_" in line for line in code),
        "fused": None,
        "ticket": [line for line in code if re.search(_TICKET["hip"], line)],
        "beside_tickets": _beside(code, _TICKET["hip"], r"^s_barrier", r"^(global|buffer|flat)_(load|store)"),
    }


def _instructions(text: str, comments: str) -> list[str]:
    lines = (line.split(comments)[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith(".loc")]


def _beside(code: list[str], ticket: str, barrier: str, access: str) -> list[str]:
    """What comes last before the first ticket, and first behind the last: a barrier, or an access to memory
    that it should have kept on its side.
    """
    tickets = [i for i, line in enumerate(code) if re.search(ticket, line)]
    found = []
    for lines in (reversed(code[: tickets[0]]), code[tickets[-1] + 1 :]):
        line = next(line for line in lines if re.search(f"{barrier}|{access}", line))
        found.append("barrier" if re.search(barrier, line) else line)
    return found


def write_ptx(folder: Path, targets: list[str]) -> None:
    """The PTX of every variant that a step can launch, and in launches.json what a launch needs to know."""
    found = {}
    for target in targets:
        for params in _BYTES:
            steps = [
                ("step", params, moments, amsgrad, master, record)
                for moments in dict.fromkeys(("fp32", params))
                for amsgrad in (False, True)
                for master in ((False, True) if params in _REST else (False,))
                for record in (False, True)
                # what records is executed in part, as compiling takes seconds
                if not record or (moments == "fp32" and not amsgrad)
            ]
            for variant in (("norm", params, None, False, False, False), *steps):
                made = compiled(*variant, TARGETS[target])
                name = " ".join(map(str, (*variant, target)))
                (folder / f"{name}.ptx").write_text(made.asm["ptx"])
                threads = TARGETS[target].warp_size * made.metadata.num_warps
                found[name] = {"shared": made.metadata.shared, "threads": threads}
    (folder / "launches.json").write_text(json.dumps({"version": triton.__version__, "kernels": found}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--record", type=Path, help="write registers per thread into this file")
    parser.add_argument("--ptx", type=Path, help="write the PTX of all variants into this folder instead")
    args = parser.parse_args()
    if args.ptx is not None:
        write_ptx(args.ptx, args.targets)
        return
    found = {target: {variant: facts(variant, target) for variant in VARIANTS} for target in args.targets}
    if args.record is None:
        print(json.dumps({"version": triton.__version__, "targets": found}))
        return
    recorded = json.loads(args.record.read_text()) if args.record.exists() else {}
    recorded[triton.__version__] = {
        target: {variant: fact["registers"] for variant, fact in variants.items()}
        for target, variants in found.items()
    }
    args.record.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
