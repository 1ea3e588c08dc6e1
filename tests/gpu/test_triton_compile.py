"""The assembly of the Triton kernels for every GPU they are for, compiled without one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_RECORD = _ROOT / "bench/results/triton_registers.json"

TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# a folder with another version of Triton, as from `pip install --target`: its barriers differ
_OTHER = os.environ.get("FUSEDLR_OTHER_TRITON")

pytestmark = pytest.mark.slow


@cache
def compiled(target: str, other: bool) -> dict[str, Any]:
    """What tests/gpu/triton_compile.py says of all kernels on one GPU."""
    path = [_OTHER or "", str(_ROOT)] if other else [str(_ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
    # nothing is compiled in the interpreter
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(_ROOT / "tests/gpu/triton_compile.py"), target]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(params=(False, True), ids=("installed", "other"))
def other(request: pytest.FixtureRequest) -> bool:
    if request.param and not _OTHER:
        pytest.skip("FUSEDLR_OTHER_TRITON names no folder with a second version of Triton")
    if not request.param and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    return request.param


@pytest.mark.parametrize("target", TARGETS)
def test_the_wide_path_is_wide_and_nothing_spills(target: str, other: bool) -> None:
    for variant, fact in compiled(target, other)["targets"][target].items():
        for access, wanted in fact["wanted"].items():
            # a loop that was unrolled has the accesses several times
            assert fact[access] >= wanted and fact[access] % max(wanted, 1) == 0, (variant, access, fact)
        assert fact["converted"] == 0, (variant, fact)
        assert fact["spilled"] == 0 and fact["local"] == 0, (variant, fact)


@pytest.mark.parametrize("target", TARGETS)
def test_no_fp64_and_no_fused_product(target: str, other: bool) -> None:
    for variant, fact in compiled(target, other)["targets"][target].items():
        assert fact["fp64"] == 0, (variant, fact)
        assert fact["fused"] in (0, None), (variant, fact)


@pytest.mark.parametrize("target", TARGETS)
def test_a_ticket_releases_and_the_last_one_acquires(target: str, other: bool) -> None:
    for variant, fact in compiled(target, other)["targets"][target].items():
        assert fact["beside_tickets"] == ["barrier", "barrier"], (variant, fact)
        ticket, last = fact["ticket"]
        if not target.startswith("gfx"):
            assert ".release.add." in ticket and ".acquire.exch." in last, (variant, fact)
            # either would make every program throw its first cache away
            assert fact["fences"] == 0, (variant, fact)


@pytest.mark.parametrize("target", TARGETS)
def test_the_recorded_registers_are_current(target: str, other: bool) -> None:
    recorded = json.loads(_RECORD.read_text())
    found = compiled(target, other)
    if found["version"] not in recorded:
        pytest.skip(f"{_RECORD.name} has no registers of Triton {found['version']}")
    registers = {variant: fact["registers"] for variant, fact in found["targets"][target].items()}
    assert recorded[found["version"]][target] == registers
