"""The machine in Python: loads PTX, orders threads, is told what memory there is, and reports what is wrong.

It knows nothing of the project; driver.py does.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

# as Kind in machine/reports.h
KINDS = ("race", "same-value race", "out of bounds", "misaligned", "undefined", "sync", "other")


class Order(NamedTuple):
    """How blocks, warps and lanes take turns: see Settings in machine/state.h."""

    resident: int
    burst: int
    split: int
    blocks: int


ORDERS = {
    # blocks as they are numbered, a warp for as long as it can
    "straight": Order(resident=16, burst=1000, split=0, blocks=0),
    "backwards": Order(resident=32, burst=300, split=0, blocks=1),
    # a block is held back, warps change often
    "shuffled": Order(resident=6, burst=40, split=0, blocks=2),
    # lanes of a warp leave each other behind
    "torn": Order(resident=4, burst=7, split=35, blocks=2),
}


class Stats(NamedTuple):
    """What has been run: see Stats in machine/state.h."""

    launches: int
    instructions: int
    generic: int
    wide: int
    narrow: int
    divergent_bars: int
    approx: int


class Machine:
    """The library, of which a process has one."""

    def __init__(self, library: Path) -> None:
        self._library = c = ctypes.CDLL(str(library))
        u32, u64, i32 = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int
        for name in ("error", "reports", "coverage"):
            getattr(c, f"machine_{name}").restype = ctypes.c_char_p
        c.machine_activate.argtypes = [i32, ctypes.c_char_p]
        c.machine_alloc.argtypes = [u64, u64, i32, i32, ctypes.c_char_p]
        c.machine_forget.argtypes = [u64]
        c.machine_fail_after.argtypes = [ctypes.c_long]
        c.machine_settings.argtypes = [u64, *[i32] * 6]
        c.machine_param_bytes.argtypes = [ctypes.c_char_p]
        c.machine_launch.argtypes = [ctypes.c_char_p, u32, u32, ctypes.c_char_p, u64, i32]
        self._loaded: dict[str, int] = {}
        # those of faults, which nobody asks for again
        self._passing: list[int] = []
        self._before_launch: Any = None

    def activate(self, text: str, alias: str = "", *, keep: bool = True) -> None:
        """Let launches find the kernels of a module, by their names or the only one by another.

        One that is not to be kept is there until `unload`.
        """
        module = self._loaded.get(text)
        if module is None:
            module = self._library.machine_load(text.encode())
            if module < 0:
                raise ValueError(self.error())
            if keep:
                self._loaded[text] = module
            else:
                self._passing.append(module)
        self._library.machine_activate(module, alias.encode())

    def unload(self) -> None:
        """Forget the modules that were not to be kept."""
        for module in self._passing:
            self._library.machine_unload(module)
        self._passing.clear()

    def before_launch(self, call: Any) -> None:
        """Have `call()` run before every launch, or nothing if it is None."""
        # kept, as the library has no more than its address
        self._before_launch = None if call is None else ctypes.CFUNCTYPE(None)(call)
        self._library.machine_before_launch(self._before_launch)

    def launch(self, name: str, blocks: int, threads: int, parameters: bytes, shared: int = 0) -> None:
        """Run a kernel; parameters that are not given are 0."""
        room = self._library.machine_param_bytes(name.encode())
        parameters += bytes(max(0, room - len(parameters)))
        if self._library.machine_launch(name.encode(), blocks, threads, parameters, len(parameters), shared):
            raise RuntimeError(self.error())

    def order(self, name: str, seed: int = 0, approx: int = 0, races: bool = True) -> None:
        """How threads take turns from now on; `approx`: what approximate instructions return."""
        resident, burst, split, blocks = ORDERS[name]
        self._library.machine_settings(seed, approx, resident, burst, split, blocks, int(races))

    def fail_after(self, launches: int) -> None:
        """Let the launch after so many of them fail, once."""
        self._library.machine_fail_after(launches)

    # memory

    def forget_memory(self) -> None:
        """Nothing may be touched until it is given again."""
        self._library.machine_clear_allocs()

    def give(self, x: Tensor | None, name: str, tracked: bool = False) -> None:
        """Let launches touch a tensor, and no byte around it; `tracked`: undefined until it is written."""
        if x is not None and x.numel():
            size = x.element_size()
            self._library.machine_alloc(
                x.data_ptr(), x.numel() * size, min(size, 4), int(tracked), name.encode()
            )

    def give_everything(self) -> None:
        """Let launches touch all memory; races cannot be looked for then."""
        self._library.machine_alloc(1, 2**62, 4, 0, b"memory")

    def undefine(self, x: Tensor) -> None:
        """Forget what has been written to a tracked tensor."""
        self._library.machine_forget(x.data_ptr())

    # reports

    def error(self) -> str:
        """Why something has failed, the last time something did."""
        return self._library.machine_error().decode()

    def take_reports(self) -> list[str]:
        """What has been found wrong since the last call, one line each that begins with its kind."""
        lines = self._library.machine_reports().decode().splitlines()
        self._library.machine_reset_reports()
        return lines

    def coverage(self) -> dict[str, tuple[int, int]]:
        """By kernel: how many of its instructions have run in some launch, and how many it has."""
        lines = self._library.machine_coverage().decode().splitlines()
        split = (line.rsplit(" ", 2) for line in lines)
        return {name: (int(ran), int(every)) for name, ran, every in split}

    def stats(self) -> Stats:
        """What has been run."""
        out = (ctypes.c_long * len(Stats._fields))()
        self._library.machine_stats(out)
        return Stats(*out)
