"""How pytest-xdist shares the tests out, where it runs them (`make test` does): see conftest.py.

A file stays in one process, in its order: its tests share fixtures and caches. Those that only start other
processes share nothing, and go wherever there is room, the longest first.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

# files of such tests; those with the same parameters do share
_APART = ("test_build.py", "test_triton_compile.py", "test_triton_interpreter.py")
# half a minute and more, though none of their tests is marked `slow`
_LONG = ("test_bench.py", "test_cuda_schedule.py", "test_trajectory.py")


def scope(nodeid: str) -> str:
    """What is run by one process: the file, or one test and those with its parameters.

    >>> scope("tests/step/test_shapes.py::test_step[cpu]")
    'tests/step/test_shapes.py'
    >>> scope("tests/gpu/test_triton_compile.py::test_ticket[other-sm_90]")
    'tests/gpu/test_triton_compile.py[other-sm_90]'
    >>> scope("tests/tools/test_build.py::test_wheel")
    'tests/tools/test_build.py::test_wheel'
    """
    file, _, rest = nodeid.partition("::")
    if not file.endswith(_APART):
        return file
    _, bracket, parameters = rest.partition("[")
    return f"{file}[{parameters}" if bracket else nodeid


def longest_first(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What starts last should be short, or all other processes wait for it; `items` are put in order."""
    if _processes(config):
        items.sort(key=lambda item: not (item.get_closest_marker("slow") or item.path.name in _LONG))


def share_threads(config: pytest.Config) -> None:
    """Give this process, and those it starts, its share of the threads.

    Tests of what several threads do ask for them themselves.
    """
    if processes := _processes(config):
        threads = max(1, torch.get_num_threads() // processes)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deals out by `scope`, unless a way other than that of a bare `-n` was asked for."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    # the order is that of `longest_first`, not by the number of tests
    config.option.loadscopereorder = False

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    return Scheduling(config, log)


def _processes(config: pytest.Config) -> int:
    """How many share the tests; 0 in a process that is none of them."""
    return getattr(config, "workerinput", {}).get("workercount", 0)
