"""NVRTC, CUDA's compiler as a library: where it is, which GPUs it knows, and what it makes of a source.

Every CUDA build of torch brings one. Nothing here needs a GPU or a driver.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch


class CompileError(RuntimeError):
    """NVRTC refused a source, or failed; the message has what it says."""


class Compiled(NamedTuple):
    """What was made of a source."""

    image: bytes  # machine code for one architecture (a cubin), or PTX
    names: dict[str, str]  # name of a kernel in C++ -> its name in the image
    log: str
    ptx: str = ""  # of machine code, where it was asked for


class Nvrtc:
    """One NVRTC library.

    Attributes:
        path: where it was found.
        version: such as (12, 9).
        archs: compute capabilities that it compiles for, 90 for 9.0, in order.

    Raises:
        OSError, AttributeError: this is no NVRTC, or one that is older than CUDA 11.2.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = library = ctypes.CDLL(path)
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = major.value, minor.value
        self._check(library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        archs = (ctypes.c_int * count.value)()
        self._check(library.nvrtcGetSupportedArchs(archs))
        self.archs = sorted(archs)

    def compile(
        self,
        source: str,
        arch: str,
        kernels: Sequence[str],
        headers: Mapping[str, str],
        options: Sequence[str] = (),
        *,
        ptx: bool = False,
    ) -> Compiled:
        """Compile for `arch`: machine code for one like "sm_90", PTX for one like "compute_90".

        Args:
            source: C++ text.
            arch: what to compile for.
            kernels: kernels as C++ expressions, `f<float>` say; templates are instantiated for them.
            headers: text of every header that the source includes, by its name.
            options: more of NVRTC's options.
            ptx: whether to return the PTX too that the machine code was made of.

        Raises:
            CompileError: the source does not compile, or NVRTC does not know the architecture.
        """
        nvrtc, program, failed = self._library, ctypes.c_void_p(), None
        texts, names = _strings(headers.values()), _strings(headers)
        self._check(
            nvrtc.nvrtcCreateProgram(
                ctypes.byref(program), source.encode(), b"fusedlr.cu", len(headers), texts, names
            )
        )
        try:
            for kernel in kernels:
                self._check(nvrtc.nvrtcAddNameExpression(program, kernel.encode()))
            words = [f"--gpu-architecture={arch}", *options]
            failed = nvrtc.nvrtcCompileProgram(program, len(words), _strings(words))
            log = self._text(program, "ProgramLog").decode(errors="replace")
            if failed:
                why = f"{self._reason(failed)}\n{log}".rstrip()
                raise CompileError(f"NVRTC {self} could not compile for {arch}: {why}")
            image = self._text(program, "CUBIN" if arch.startswith("sm_") else "PTX")
            lowered = {kernel: self._lowered(program, kernel) for kernel in kernels}
            text = self._text(program, "PTX").decode() if ptx else ""
            return Compiled(image, lowered, log, text)
        finally:
            nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

    def _lowered(self, program: ctypes.c_void_p, kernel: str) -> str:
        name = ctypes.c_char_p()
        self._check(self._library.nvrtcGetLoweredName(program, kernel.encode(), ctypes.byref(name)))
        assert name.value is not None
        return name.value.decode()

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(self._library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(self._library[f"nvrtcGet{what}"](program, buffer))
        # text ends with a zero, machine code with its last byte
        return buffer.raw if what == "CUBIN" else buffer.value

    def _check(self, failed: int) -> None:
        if failed:
            raise CompileError(f"NVRTC: {self._reason(failed)}")

    def _reason(self, failed: int) -> str:
        return self._library.nvrtcGetErrorString(failed).decode()

    def __str__(self) -> str:
        return f"{self.version[0]}.{self.version[1]}"


def _strings(words: Any) -> Any:
    words = [word.encode() for word in words]
    return (ctypes.c_char_p * len(words))(*words)


@cache
def found() -> tuple[Nvrtc, ...]:
    """The NVRTC libraries of this environment, one per major version, that of torch first."""
    libraries: dict[int, Nvrtc] = {}
    for path in _paths():
        try:
            library = Nvrtc(path)
        except (OSError, AttributeError, CompileError):
            # such a file is no NVRTC that can be used here, or there is none of that name
            continue
        libraries.setdefault(library.version[0], library)
    own = int((torch.version.cuda or "0").split(".")[0])
    return tuple(libraries[major] for major in sorted(libraries, key=lambda x: (x != own, -x)))


def _paths() -> Iterator[str]:
    """Where an NVRTC may be: beside torch, in NVIDIA's packages, then what the dynamic linker finds."""
    folders = [Path(torch.__file__).parent / "lib"]
    for entry in map(Path, sys.path):
        folders += sorted(entry.glob("nvidia/*/lib"), reverse=True)
    for folder in folders:
        for path in sorted(folder.glob("libnvrtc*.so.*"), reverse=True):
            if "builtins" not in path.name and ".alt." not in path.name:
                yield str(path)
    for major in (13, 12):
        yield f"libnvrtc.so.{major}"
