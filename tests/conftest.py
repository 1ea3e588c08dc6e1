"""What every test runs under: poisoned memory, a seed, and one run per backend where a test asks for it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parallel
import pytest
import torch
from harness import backends_on
from ptx import driver

# model hubs must not be asked for anything: tests run without a network
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _interpret_faster() -> None:
    """Do not patch the language anew for every function in a kernel: half of the interpreter's time."""
    from triton.runtime.interpreter import InterpretedFunction

    patching = InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Triton's own functions see parts of it that kernels do not
        ours = self.fn.__module__.startswith("fusedlr.")
        return self.rewrite()(*args, **kwargs) if ours else patching(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if _INTERPRETED:
    _interpret_faster()
_TOOLS = Path(__file__).parent / "tools"
# no tests in them, and they need Triton
collect_ignore = ["gpu/triton_compile.py", "gpu/triton_math_kernels.py"]


def pytest_configure(config: pytest.Config) -> None:
    if not torch.cuda.is_available() and not _INTERPRETED:
        # before other processes start, which would each wait for the compilers
        driver.installed()
    parallel.share_threads(config)


# by name alone, as xdist need not be installed
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return parallel.make_scheduler(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _INTERPRETED:
        # not skipped: test_triton_interpreter.py does run them
        elsewhere = [item for item in items if item.get_closest_marker("interpreter")]
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]
    for item in items:
        if _TOOLS in item.path.parents:
            item.add_marker(pytest.mark.tools)
    parallel.longest_first(config, items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with `device` and `backend` on all that can run here, one with `gpu_backend` on the CPU."""
    if {"device", "backend"} <= set(metafunc.fixturenames):
        pairs = [("cpu", name) for name in backends_on("cpu")]
        if torch.cuda.is_available():
            pairs += [pytest.param("cuda", name, marks=pytest.mark.gpu) for name in backends_on("cuda")]
        metafunc.parametrize(("device", "backend"), pairs)
    if "gpu_backend" in metafunc.fixturenames:
        here, missing = backends_on("cpu"), driver.why_not()
        skips = [
            pytest.mark.skipif(name not in here, reason=missing[name] or f"no {name} on this CPU")
            for name in driver.BACKENDS
        ]
        names = [pytest.param(name, marks=mark) for name, mark in zip(driver.BACKENDS, skips, strict=True)]
        metafunc.parametrize("gpu_backend", names)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` and its relatives return: nan for floats, the largest number for integers."""
    # torch fills uninitialised memory only in deterministic mode; warn_only for operators that have none
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """For tests that make a hundred tiny training runs: what costs more than the runs is left out.

    One thread: waking a second one takes longer than an operation (measured: 40 ms against 7 ms per update).
    And transformers collects garbage after each run, 0.2 s over all that is imported.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)
