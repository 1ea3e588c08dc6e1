"""The CUDA kernels of csrc/cuda/step.cu, compiled by NVRTC when they are first needed, and kept on disk.

backends/gpu/cuda.py launches them. What they are compiled for is decided here, from what the GPU, its driver
and NVRTC can do.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from fusedlr.backends.gpu.cache import Cache, key_of
from fusedlr.backends.gpu.nvrtc import Compiled, Nvrtc, found
from fusedlr.columns import header

# type of parameters or moments -> the same in C++
TYPES = {"f32": "float", "bf16": "fusedlr::BF16", "f16": "fusedlr::F16"}
# how many gradients a launch carries -> the number in csrc/cuda/step.h
SIZES = {"few": "fusedlr::kFew", "many": "fusedlr::kMany"}
# Turing, the oldest that NVRTC 13 knows
MIN_ARCH = 75
# the first NVRTC and driver that know launches with 32 KB of parameters
MIN_MANY = (12, 1)

# products are rounded as the reference rounds them, divisions and roots as IEEE has them
OPTIONS = (
    "--std=c++17",
    "--fmad=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--ftz=false",
    # functions of the headers that kernels do not call
    "--diag-suppress=177",
)
# what the C++ library's headers have for the kernels: NVRTC comes without them, and knows the functions
_LIBRARY = {
    "cstdint": "typedef signed char int8_t; typedef unsigned char uint8_t; typedef short int16_t; "
    "typedef unsigned short uint16_t; typedef int int32_t; typedef unsigned int uint32_t; "
    "typedef long long int64_t; typedef unsigned long long uint64_t; "
    "typedef unsigned long long uintptr_t;\n",
    "cmath": "namespace std { using ::cos; using ::expm1; using ::fabs; using ::pow; using ::sin; "
    "using ::sqrt; }\n",
    "cstring": "namespace std { using ::memcpy; }\n",
}
# compiling that takes longer than this is announced, in seconds
_PATIENCE = 2.0

_log = logging.getLogger("fusedlr")


def csrc() -> Path:
    """Where the sources are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    return next(path for path in (package / "csrc", package.parent / "csrc") if (path / "cuda").is_dir())


def sources(folder: Path | None = None) -> tuple[str, dict[str, str]]:
    """The text of step.cu, and that of every header that is included in it, by the name it is included by."""
    folder = csrc() if folder is None else folder
    text = (folder / "cuda" / "step.cu").read_text()
    headers, todo = {}, [(text, folder / "cuda")]
    while todo:
        including, beside = todo.pop()
        for name in re.findall(r'^#include ["<](.*)[">]', including, re.MULTILINE):
            if name not in headers:
                known = header() if name == "columns.h" else _LIBRARY.get(name)
                headers[name] = (beside / name).read_text() if known is None else known
                todo.append((headers[name], (beside / name).parent))
    return text, headers


def types(*, master: bool) -> tuple[str, ...]:
    """The types of parameters; of those that a `master` is kept of, the 16-bit ones."""
    return tuple(type_ for type_ in TYPES if type_ != "f32" or not master)


def kernel_names(type_: str, size: str, *, master: bool = False, record: bool = False) -> list[str]:
    """The kernels for parameters of one type and launches of one size, as C++ has them.

    With `master` the updates that find the rest of the parameters' fp32 values in the state, with `record`
    those that record what they do.
    """
    steps = [
        name_of_step(type_, m, amsgrad, size, master=master, record=record)
        for m in ("f32", type_)
        for amsgrad in (False, True)
    ]
    return [*([] if master or record else [name_of_norm(type_, size)]), *dict.fromkeys(steps)]


def name_of_norm(type_: str, size: str) -> str:
    """The kernel that sums squares of gradients of a type."""
    return f"fusedlr::norm_kernel<{TYPES[type_]}, {SIZES[size]}>"


def name_of_step(
    type_: str, moments: str, amsgrad: bool, size: str, *, master: bool = False, record: bool = False
) -> str:
    """The kernel that updates parameters of a type, with moments of another or the same."""
    flags = ", ".join(str(flag).lower() for flag in (amsgrad, master, record))
    return f"fusedlr::step_kernel<{TYPES[type_]}, {TYPES[moments]}, {flags}, {SIZES[size]}>"


def compile_(
    nvrtc: Nvrtc,
    arch: str,
    type_: str,
    size: str,
    folder: Path | None = None,
    *,
    master: bool = False,
    record: bool = False,
) -> Compiled:
    """Compile the kernels of one type and size, without a look at the cache."""
    text, headers = sources(folder)
    names = kernel_names(type_, size, master=master, record=record)
    return nvrtc.compile(text, arch, names, headers, OPTIONS)


def target(capability: int, driver: int, libraries: Iterable[Nvrtc] | None = None) -> tuple[Nvrtc, str] | str:
    """What compiles for a GPU of this compute capability, and the architecture; or why nothing does.

    Machine code for the GPU itself, else for the nearest of the same major version below it, which it runs
    too; else PTX of the newest known one, for a driver that is as new as NVRTC. Versions of drivers are
    CUDA's, 13000 for 13.0: a driver runs what an NVRTC of its major version, or an older one, has compiled.
    """
    libraries = tuple(found() if libraries is None else libraries)
    if not libraries:
        return "there is no NVRTC: torch for CUDA brings one, or pip install nvidia-cuda-nvrtc"
    if capability < MIN_ARCH:
        return f"this GPU has compute capability {dotted(capability)}, the kernels need {dotted(MIN_ARCH)}"
    usable = [nvrtc for nvrtc in libraries if nvrtc.version[0] <= driver // 1000]
    if not usable:
        versions = ", ".join(map(str, libraries))
        return f"the driver is for CUDA {version(driver)}, which runs nothing that NVRTC {versions} compiles"
    for nvrtc in usable:
        near = [arch for arch in nvrtc.archs if arch // 10 == capability // 10 and arch <= capability]
        if near:
            return nvrtc, f"sm_{near[-1]}"
    for nvrtc in usable:
        older = [arch for arch in nvrtc.archs if arch < capability]
        if older and driver >= 1000 * nvrtc.version[0] + 10 * nvrtc.version[1]:
            return nvrtc, f"compute_{older[-1]}"
    return (
        f"no NVRTC here knows compute capability {dotted(capability)}: "
        f"{', '.join(f'{nvrtc} knows up to {dotted(nvrtc.archs[-1])}' for nvrtc in usable)}"
    )


def images(
    nvrtc: Nvrtc, arch: str, size: str, *, master: bool = False, record: bool = False
) -> dict[str, Compiled]:
    """The kernels of all types for launches of one size: from the cache, or compiled now and kept there."""
    text, headers = sources()
    cache = Cache.of_user()
    keys = {
        type_: key_of(
            text,
            headers,
            OPTIONS,
            kernel_names(type_, size, master=master, record=record),
            nvrtc.version,
            arch,
        )
        for type_ in types(master=master)
    }
    kept = {type_: cache.read(key) for type_, key in keys.items()}
    missing = [type_ for type_, compiled in kept.items() if compiled is None]
    if missing:
        announced = threading.Timer(
            _PATIENCE,
            _log.warning,
            [f"fusedlr compiles its CUDA kernels for {arch} with NVRTC {nvrtc}, once: {cache.where()}"],
        )
        announced.daemon = True
        announced.start()
        try:
            with ThreadPoolExecutor(len(missing)) as pool:
                made = pool.map(
                    lambda type_: compile_(nvrtc, arch, type_, size, master=master, record=record), missing
                )
                kept.update(zip(missing, made, strict=True))
        finally:
            announced.cancel()
    for type_ in missing:
        compiled = kept[type_]
        assert compiled is not None
        cache.write(keys[type_], compiled)
    return {type_: compiled for type_, compiled in kept.items() if compiled is not None}


@cache
def launches_many(nvrtc: Nvrtc, driver: int) -> bool:
    """Whether launches may have 32 KB of parameters."""
    return nvrtc.version >= MIN_MANY and driver >= 1000 * MIN_MANY[0] + 10 * MIN_MANY[1]


def dotted(capability: int) -> str:
    """A compute capability as NVIDIA writes it: 9.0 for 90."""
    return f"{capability // 10}.{capability % 10}"


def version(number: int) -> str:
    """A version of CUDA in words: 13.0 for 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"
